"""What people see in a browser: the playground, and the pages about the interface."""
