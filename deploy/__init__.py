"""Images of containers, manifests, and what they are made with."""
