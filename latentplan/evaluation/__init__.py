"""Scores of trained agents."""
