"""The pictures that a run shows of itself, by name, each with what it means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from latentplan.agent import Agent
from latentplan.inspection.imagined_rollouts import last_state, show_conservative, show_policy
from latentplan.inspection.open_loop import show_open_loop
from latentplan.inspection.plan_fan import show_plan_fan
from latentplan.types import Timestep

SEQUENCES = 2  # side by side: with more, TensorBoard shrinks a film until its words are lost
POLICY_HORIZON = 45  # decisions
BEGIN, DREAM = 8, 40  # decisions played before a dream that is held against reality, and dreamed
FPS = 8

CAPTIONS = {
    "open_loop": (
        "What the world model saw coming. In green frames it sees the truth, in orange ones only "
        "the actions. Error is model - truth: gray where they agree. Below, rewards and the "
        "ensemble's disagreement."
    ),
    "imagined_policy": (
        "Where the policy thinks that it goes: its mean actions, imagined from a real state, with "
        "predicted reward, value, probability of going on, and disagreement of the ensemble."
    ),
    "plan_fan": (
        "What the planner weighs in one state: candidates in order of score, the chosen one in "
        "yellow, with reward (r) and uncertainty (u) of every step. Above as in the environment, "
        "where uncertainty is a bonus; below as in imagination, where it is a penalty. Return and "
        "uncertainty of the score are in units of their scales."
    ),
    "planner_against_policy": (
        "The same states and randomness, imagined by the policy and by the conservative planner, "
        "and what differs. The sums are of predicted rewards and of disagreement so far."
    ),
    "dream_against_reality": (
        "The policy dreams from a real state; then the simulator takes the dreamed actions. "
        "Distance is the root mean square error of the observation."
    ),
    "calibration": (
        "Does the uncertainty know where the model errs? Left: rank correlation of the two, k "
        "decisions ahead; 0 is chance, 1 perfect. Middle: how the errors grow. Right: the mean "
        "error of windows with little, more, much uncertainty; a line that rises can be relied on."
    ),
}


class Exhibit(NamedTuple):
    """A film, or a still of one frame."""

    name: str  # a key of CAPTIONS
    frames: np.ndarray  # (T, H, W, 3) uint8


def exhibits(agent: Agent, batch: Timestep, context: int) -> Iterator[Exhibit]:
    """Everything that can be shown of rows (B, T) without an environment.

    Draws from torch's global generator. An agent without pictures shows the charts, as stills.
    """
    few = batch.map(lambda x: x[:SEQUENCES])
    seen = few.map(lambda x: x[:, :context])
    yield of_film(agent, "open_loop", show_open_loop(agent, few, context))
    yield of_film(agent, "imagined_policy", show_policy(agent, seen, POLICY_HORIZON))
    state = last_state(agent, seen.map(lambda x: x[:1]))
    yield Exhibit("plan_fan", show_plan_fan(agent, state)[None])
    if agent.config.plan.candidates > 1:
        film = show_conservative(agent, seen, agent.config.behavior.horizon)
        yield of_film(agent, "planner_against_policy", film)


def of_film(agent: Agent, name: str, film: np.ndarray) -> Exhibit:
    """``film`` under its name; without pictures nothing moves, and its last frame says it all."""
    return Exhibit(name, film if agent.world.spec.images else film[-1:])
