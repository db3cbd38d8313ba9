"""Training: a session and its start, the training loop, its monitor, and compilation."""
