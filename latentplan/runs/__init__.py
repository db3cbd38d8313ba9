"""The files of a run: its folder, checkpoints, logs and provenance."""
