"""Films of rollouts imagined from a real state: by the policy, and by the planner beside it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior.imagination import Act, imagine, sampled
from latentplan.inspection.action_names import action_texts
from latentplan.inspection.canvas import (
    CONTEXT,
    IMAGINED,
    SECOND,
    UNCERTAIN,
    Charts,
    Line,
    as_uint8,
    difference,
)
from latentplan.inspection.film import Header, make_film
from latentplan.inspection.open_loop import decode, to_numpy
from latentplan.runs.stamp import TEXT
from latentplan.types import Choice, Latent, Rollout, Timestep


def last_state(agent: Agent, batch: Timestep) -> Latent:
    """The posterior latents (B) of the last rows of a batch (B, T)."""
    posterior, _ = agent.world.observe(batch)
    return posterior.map(lambda x: x[:, -1])


@torch.no_grad()
def make_imagined_policy_film(agent: Agent, batch: Timestep, horizon: int) -> np.ndarray:
    """Imagine the mean actions of the policy from the last rows of a batch (B, T).

    The charts show reward, value, continuation probability and uncertainty.

    Returns:
        (horizon + 1, H, W, 3) uint8. The first frame is the state in which imagination starts.
    """
    start = last_state(agent, batch)
    noise = agent.world.draw_noise(start.deter.shape[0], horizon)
    rollout = imagine(agent.world.step, mean_action(agent), start, horizon, noise)
    # These values belong to the arrival in a state, so the first state has none.
    arrived = lambda x: to_numpy(torch.nn.functional.pad(x, (1, 0), value=torch.nan))  # noqa: E731
    charts: Charts = {
        "reward": [Line("reward", arrived(rollout.reward), TEXT)],
        "value": [Line("value", to_numpy(agent.behavior.value(rollout.latent)), IMAGINED)],
        "continue": [Line("continue", arrived(rollout.cont), CONTEXT, (0.0, 1.0))],
        "uncertainty": [Line("uncertainty", arrived(rollout.uncertainty), UNCERTAIN)],
    }
    rows = _decoded_rows(agent, {"imagined": rollout})
    texts = action_texts(agent.world.spec, action=after_real_state(rollout))
    return make_film(rows, headers_after_real_state("imagined", horizon), charts, texts=texts)


@torch.no_grad()
def make_planner_against_policy_film(agent: Agent, batch: Timestep, horizon: int) -> np.ndarray:
    """Compare imagined rollouts of the policy and of the conservative planner.

    Both start from the last rows of a batch (B, T) and use the same random numbers. The charts
    show the sums of reward and uncertainty so far.

    Returns:
        (horizon + 1, H, W, 3) uint8.

    Raises:
        ValueError: ``plan.candidates`` is 1, so there is no planner.
    """
    if agent.config.plan.candidates == 1:
        raise ValueError("There is no planner: plan.candidates is 1.")
    start, behavior = last_state(agent, batch), agent.behavior
    n = start.deter.shape[0]
    noise = agent.world.draw_noise(n, horizon)
    drawn = torch.randn(horizon, n, agent.world.spec.action_dim, device=agent.device)

    policy = sampled(lambda latent, h: behavior.policy(latent), drawn)
    planner = behavior.conservative(torch.arange(n, device=agent.device))
    with agent.world.autocast():
        by_policy, by_planner = (
            imagine(agent.world.step, act, start, horizon, noise) for act in (policy, planner)
        )
    both = lambda get: [  # noqa: E731
        Line("policy", to_numpy(get(by_policy)), TEXT),
        Line("planner", to_numpy(get(by_planner)), SECOND),
    ]
    charts = {
        "reward": both(lambda x: x.reward.cumsum(1)),
        "uncertainty": both(lambda x: x.uncertainty.cumsum(1)),
    }
    charts = {f"sum of {name}": [_prepend_zero(x) for x in lines] for name, lines in charts.items()}
    rows = _decoded_rows(agent, {"policy": by_policy, "planner": by_planner})
    if rows:
        rows["difference"] = difference(rows["policy"], rows["planner"])
    both_actions = {"policy": after_real_state(by_policy), "planner": after_real_state(by_planner)}
    texts = action_texts(agent.world.spec, **both_actions)
    return make_film(rows, headers_after_real_state("imagined", horizon), charts, texts=texts)


def mean_action(agent: Agent) -> Act:
    """An ``act`` for imagination that takes the mean action, as evaluation does."""

    def act(latent: Latent, h: int) -> Choice:
        action = agent.behavior.policy(latent).mode
        return Choice(action, torch.zeros_like(action))

    return act


def _prepend_zero(line: Line) -> Line:
    """Add the sum of the first state, which is 0, to sums over the later steps."""
    return line._replace(values=np.pad(line.values, ((0, 0), (1, 0))))


def headers_after_real_state(word: str, horizon: int) -> list[Header]:
    """Headers of a film whose first frame is real, followed by ``horizon`` imagined frames."""
    return [("real state", CONTEXT), *((f"{word} +{h + 1}", IMAGINED) for h in range(horizon))]


def after_real_state(rollout: Rollout) -> Tensor:
    """The actions (B, H + 1, A) that led to the states of a rollout. The first one is zeros."""
    return torch.nn.functional.pad(rollout.choice.action, (0, 0, 1, 0))


def _decoded_rows(agent: Agent, rollouts: dict[str, Rollout]) -> dict[str, np.ndarray]:
    """Rows of a film: decoded images of rollouts. Empty if the agent sees no images."""
    images = agent.world.spec.images
    if not images:
        return {}
    return {
        label: as_uint8(to_numpy(decode(agent, rollout.latent)[images[0]]))
        for label, rollout in rollouts.items()
    }
