"""What the agent imagines from a real state: its policy alone, and beside it the planner."""

from __future__ import annotations

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.behavior.imagination import Act, imagine, sampled
from latentplan.inspection.canvas import (
    CONTEXT,
    IMAGINED,
    SECOND,
    TEXT,
    UNCERTAIN,
    Charts,
    Line,
    as_uint8,
    difference,
)
from latentplan.inspection.film import Header, film
from latentplan.inspection.open_loop import array, decode
from latentplan.types import Choice, Latent, Rollout, Timestep


def last_state(agent: Agent, batch: Timestep) -> Latent:
    """The posterior latents (B) of the last rows of a batch (B, T)."""
    posterior, _ = agent.world.observe(batch)
    return posterior.map(lambda x: x[:, -1])


@torch.no_grad()
def show_policy(agent: Agent, batch: Timestep, horizon: int) -> np.ndarray:
    """Where the policy thinks that it goes: its mean actions, ``horizon`` steps from the last rows
    of a batch (B, T), with reward, value, probability of going on and uncertainty as charts.

    Returns:
        (horizon + 1, H, W, 3), the first frame being the state it starts from.
    """
    start = last_state(agent, batch)
    noise = agent.world.draw_noise(start.deter.shape[0], horizon)
    rollout = imagine(agent.world.step, mean_action(agent), start, horizon, noise)
    arrived = lambda x: array(torch.nn.functional.pad(x, (1, 0), value=torch.nan))  # noqa: E731
    charts: Charts = {
        "reward": [Line("reward", arrived(rollout.reward), TEXT)],
        "value": [Line("value", array(agent.behavior.value(rollout.latent)), IMAGINED)],
        "continue": [Line("continue", arrived(rollout.cont), CONTEXT, (0.0, 1.0))],
        "uncertainty": [Line("uncertainty", arrived(rollout.uncertainty), UNCERTAIN)],
    }
    rows = _rows(agent, {"imagined": rollout})
    return film(rows, real_start("imagined", horizon), charts)


@torch.no_grad()
def show_conservative(agent: Agent, batch: Timestep, horizon: int) -> np.ndarray:
    """The same states and randomness with and without the conservative planner, and what differs.

    Raises:
        ValueError: one candidate is no choice.
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
        plain, planned = (
            imagine(agent.world.step, act, start, horizon, noise) for act in (policy, planner)
        )
    both = lambda get: [  # noqa: E731
        Line("policy", array(get(plain)), TEXT),
        Line("planner", array(get(planned)), SECOND),
    ]
    charts = {
        "reward": both(lambda x: x.reward.cumsum(1)),
        "uncertainty": both(lambda x: x.uncertainty.cumsum(1)),
    }
    charts = {f"sum of {name}": [_from_start(x) for x in lines] for name, lines in charts.items()}
    rows = _rows(agent, {"policy": plain, "planner": planned})
    if rows:
        rows["difference"] = difference(rows["policy"], rows["planner"])
    return film(rows, real_start("imagined", horizon), charts)


def mean_action(agent: Agent) -> Act:
    """Imagination's ``act`` that does what evaluation does."""

    def act(latent: Latent, h: int) -> Choice:
        action = agent.behavior.policy(latent).mode
        return Choice(action, torch.zeros_like(action))

    return act


def _from_start(line: Line) -> Line:
    """Sums over the steps so far, of which the first state has none."""
    return line._replace(values=np.pad(line.values, ((0, 0), (1, 0))))


def real_start(word: str, horizon: int) -> list[Header]:
    """Headers of a film that leaves reality after its first frame."""
    return [("real state", CONTEXT), *((f"{word} +{h + 1}", IMAGINED) for h in range(horizon))]


def _rows(agent: Agent, rollouts: dict[str, Rollout]) -> dict[str, np.ndarray]:
    images = agent.world.spec.images
    if not images:
        return {}
    return {
        label: as_uint8(array(decode(agent, rollout.latent)[images[0]]))
        for label, rollout in rollouts.items()
    }
