"""Training: the start of a session, the training loop, its monitor, and compilation."""
