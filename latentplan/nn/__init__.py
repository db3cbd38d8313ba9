"""Building blocks: layers, member-stacked layers, distributions, the optimizer."""
