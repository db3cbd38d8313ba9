"""Recorded data of other programs: its episodes are checked and written in the replay's format."""
