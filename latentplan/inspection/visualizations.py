"""The films and stills that a run shows, by name, with captions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from latentplan.agent import Agent
from latentplan.inspection.imagined_rollouts import (
    last_state,
    make_imagined_policy_film,
    make_planner_against_policy_film,
)
from latentplan.inspection.open_loop import make_open_loop_film
from latentplan.inspection.plan_fan import make_plan_fan
from latentplan.types import Timestep

SEQUENCES = 2  # sequences side by side; with more, TensorBoard makes the text of a film illegible
POLICY_HORIZON = 45  # decisions of the imagined policy
REAL_DECISIONS = 8  # decisions played before the dream that is compared with reality
DREAM_DECISIONS = 40  # decisions of that dream
FPS = 8

CAPTIONS = {
    "open_loop": (
        "Predictions of the world model. In frames with a green border the model receives the "
        "true observations, in frames with an orange border only the actions. Error is model - "
        "truth; it is gray where they agree. The charts show the rewards, whether the episode went "
        "on and the predicted probability of that, and the disagreement of the ensemble. A run "
        "from state vectors has charts of the entries that vary most in the place of images, and a "
        "mark at the first imagined row."
    ),
    "imagined_policy": (
        "The mean actions of the policy, imagined from a real state. The charts show the "
        "predicted reward, the value, the probability that the episode continues, and the "
        "disagreement of the ensemble."
    ),
    "plan_fan": (
        "The candidates of the planner in one state, in the order of their scores. The chosen one "
        "has a yellow frame. The numbers are the reward (r) and the uncertainty (u) of every step. "
        "The upper plan is for the environment, where uncertainty is a bonus. The lower plan is "
        "for imagination, where uncertainty is a penalty. In the scores, return and uncertainty "
        "are in units of their scales."
    ),
    "planner_against_policy": (
        "Rollouts of the policy and of the conservative planner, imagined from the same states "
        "with the same random numbers, and their difference. The charts show the sums of the "
        "predicted rewards and of the disagreement so far."
    ),
    "dream_against_reality": (
        "A rollout that the policy imagines from a real state, and the simulator under the same "
        "actions. Distance is the root mean square error of the observation. A run from state "
        "vectors has charts of the entries that vary most, and the scene where it can be drawn."
    ),
    "calibration": (
        "The errors of the model where it is certain (left) and where it is uncertain (right), in "
        "units of the mean error. A rising line means that more uncertain predictions have larger "
        "errors; a level one means that the uncertainty says nothing."
    ),
}


class Visualization(NamedTuple):
    """A film, or a still with one frame."""

    name: str  # a key of CAPTIONS
    frames: np.ndarray  # (T, H, W, 3) uint8


def visualizations(agent: Agent, batch: Timestep, context: int) -> Iterator[Visualization]:
    """Make all films and stills that need no environment, from rows (B, T).

    Random numbers come from torch's global generator. If the agent sees no images, all results are
    stills of charts.

    Args:
        agent: the agent.
        batch: (B, T) rows, each window within one episode. The first ``SEQUENCES`` are used.
        context: rows whose observations the model receives.
    """
    sequences = batch.map(lambda x: x[:SEQUENCES])
    context_rows = sequences.map(lambda x: x[:, :context])
    film = make_open_loop_film(agent, sequences, context)
    yield film_or_still(agent, "open_loop", film, still=context)
    film = make_imagined_policy_film(agent, context_rows, POLICY_HORIZON)
    yield film_or_still(agent, "imagined_policy", film)
    state = last_state(agent, context_rows.map(lambda x: x[:1]))
    yield Visualization("plan_fan", make_plan_fan(agent, state)[None])
    if agent.config.plan.candidates > 1:
        horizon = agent.config.behavior.horizon
        film = make_planner_against_policy_film(agent, context_rows, horizon)
        yield film_or_still(agent, "planner_against_policy", film)


def film_or_still(agent: Agent, name: str, film: np.ndarray, still: int = -1) -> Visualization:
    """Name a film (T, H, W, 3). Only frame ``still`` is kept if the agent sees no images.

    Without images only the mark of the charts moves.
    """
    return Visualization(name, film if agent.world.spec.images else film[[still]])
