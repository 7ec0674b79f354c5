"""Training: the loss, the loop, and what lets it stop, go on and share its work."""
