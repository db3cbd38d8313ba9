"""Behavior learned in imagination. Sees the world only through callables (step, policy, value)."""
