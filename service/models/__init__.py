"""Which models are served, and what is known of them."""
