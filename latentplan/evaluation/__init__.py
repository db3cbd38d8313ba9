"""Evaluation of trained agents: scores of the actor and the planner."""
