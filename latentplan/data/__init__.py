"""Stored experience: the replay on disk, and batches of it on the learner's device."""
