"""Ablation studies: tasks x ablations x seeds, run on the local cores."""
