"""What was uploaded: encoded images, and what they become."""
