"""Use of a trained agent outside of training: loaded in Python, or exported to a file."""
