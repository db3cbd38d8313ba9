"""``latentplan bench``: the time of updates, plans and the training loop on this machine."""
