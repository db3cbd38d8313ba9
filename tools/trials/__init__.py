"""The trials of ``tools/reliability``: each damages or disturbs tiny runs, and counts outcomes."""
