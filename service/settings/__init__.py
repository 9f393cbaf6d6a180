"""What can be set: a module for each group of settings, and `settings` that reads them all."""
