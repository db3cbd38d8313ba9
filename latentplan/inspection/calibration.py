"""Is the model's uncertainty worth planning with? Compared with errors that it could not know.

Open loop: from ``context`` rows that the model saw, recorded actions lead k steps ahead. The
ensemble's disagreement on the way, summed over the steps, is ranked against what was then wrong:

- latent: total variation between predicted and posterior distributions, mean over groups, in [0, 1]
- reward: absolute error
- pixels (or vector): squared error of the decoded observation, summed

A useful uncertainty has a clearly positive rank correlation. World models are pulled towards states
they know, so disagreement can be low exactly where the error is high; hence this report.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from scipy import stats
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior.imagination import follow, imagine
from latentplan.nn.distributions import mixed_probs, symlog
from latentplan.types import Latent, StepNoise, Timestep

CONTEXT, HORIZON = 8, 15  # decisions that the model sees, and is then on its own
ROLLOUTS = 8  # at least, per window; their mean is the prediction


def windows(rows: Timestep, length: int, stride: int) -> Timestep:
    """Of rows (T, N), windows (B, length) that begin every ``stride`` rows of an episode and do not
    leave it. Arrays of numpy; B may be 0."""
    total, count = rows.is_first.shape
    begins: list[list[int]] = [[], []]
    for n in range(count):
        firsts = [*np.flatnonzero(rows.is_first[:, n]), total]
        for first, end in pairwise(firsts):
            found = range(first, end - length + 1, stride)
            begins[0] += found
            begins[1] += [n] * len(found)
    time, env = (np.array(x, dtype=int)[:, None] for x in begins)
    return rows.map(lambda x: x[time + np.arange(length), env])


class KStep(NamedTuple):
    """Per window and step: what was feared, and what was wrong. All (B, H)."""

    uncertainty: Tensor  # summed over the steps so far
    errors: dict[str, Tensor]


@torch.no_grad()
def k_step(agent: Agent, rows: Timestep, context: int, decode: bool = True) -> KStep:
    """Uncertainty and errors 1 .. T - context steps ahead.

    Args:
        rows: (B, T) held-out rows, each window within one episode.
        context: rows that the model sees before it is on its own.
        decode: also the errors of decoded observations.
    """
    world, n = agent.world, rows.reward.shape[0]
    members = world.config.members
    count = -(-ROLLOUTS // members) * members  # every member as often as the others
    posterior, logits = world.observe(rows)
    actions = repeat(rows.prev_action[:, context:], "b h a -> (s b) h a", s=count)
    start = posterior.map(lambda x: repeat(x[:, context - 1], "b ... -> (s b) ...", s=count))
    horizon = actions.shape[1]
    member = torch.arange(count * n, device=agent.device) // n % members
    uniform = world.draw_noise(count * n, horizon).uniform
    rollout = imagine(
        world.step,
        follow(actions),
        start,
        horizon,
        StepNoise(member.expand(horizon, -1), uniform),
    )
    mean = lambda x: rearrange(x, "(s b) ... -> s b ...", s=count).mean(0)  # noqa: E731
    errors = {
        "latent": torch.zeros(n, horizon, device=agent.device),
        "reward": (mean(rollout.reward) - rows.reward[:, context:]).abs(),
    }
    for h in range(horizon):  # pictures of all steps at once would be gigabytes
        arrived = Latent(rollout.latent.deter[:, h + 1], rollout.latent.stoch[:, h + 1])
        priors = world.rssm.prior_logits(arrived.deter).float()
        own = priors[member, torch.arange(len(member), device=agent.device)]
        predicted, seen = (
            mixed_probs(x, world.config.unimix) for x in (own, logits[:, context + h])
        )
        errors["latent"][:, h] = (mean(predicted) - seen).abs().sum(-1).mean(-1) / 2
        for name, decoded in world.decode(arrived).items() if decode else ():
            truth = rows.obs[name][:, context + h]
            truth = truth / 255.0 if name in world.spec.images else symlog(truth)
            error = (mean(decoded) - truth).square().flatten(1).sum(-1)
            errors.setdefault(name, torch.zeros_like(errors["latent"]))[:, h] = error
    return KStep(mean(rollout.uncertainty).cumsum(1), errors)


def rank_correlations(result: KStep) -> dict[str, list[float]]:
    """Spearman's rho of uncertainty and each error, k = 1 .. H; nan where one is constant."""
    uncertainty = result.uncertainty.cpu().numpy()
    return {
        name: [_spearman(uncertainty[:, k], error[:, k]) for k in range(uncertainty.shape[1])]
        for name, error in ((name, x.cpu().numpy()) for name, x in result.errors.items())
    }


def reliability(result: KStep, k: int, bins: int = 10) -> dict[str, dict[str, list[float]]]:
    """Mean error of windows with little, more, ... much uncertainty, k steps ahead (k from 1)."""
    uncertainty = result.uncertainty[:, k - 1].cpu().numpy()
    groups = np.array_split(np.argsort(uncertainty, kind="stable"), bins)
    return {
        name: {
            "uncertainty": [float(uncertainty[g].mean()) for g in groups if len(g)],
            "error": [float(error[g, k - 1].mean()) for g in groups if len(g)],
        }
        for name, error in ((name, x.cpu().numpy()) for name, x in result.errors.items())
    }


@torch.no_grad()
def one_step(agent: Agent, rows: Timestep, context: int) -> np.ndarray:
    """Uncertainty of the actions taken in states (B, T) from ``context`` on, as one array."""
    posterior, _ = agent.world.observe(rows)
    left = posterior.map(lambda x: rearrange(x[:, context - 1 : -1], "b t ... -> (b t) ..."))
    action = rearrange(rows.prev_action[:, context:], "b t a -> (b t) a")
    uncertainty = agent.world.step(left, action).uncertainty
    assert uncertainty is not None  # `step` always measures it
    return uncertainty.cpu().numpy()


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Probability that an unknown state is more uncertain than a known one; 0.5 is chance."""
    u = stats.mannwhitneyu(unknown, known).statistic
    return float(u / (len(known) * len(unknown)))


def scalars(correlations: dict[str, list[float]], separation: float | None) -> dict[str, Any]:
    """For TensorBoard: correlations 1, 5 and 15 steps ahead (where there are as many)."""
    named = {
        f"calibration/{name}_{k}": rho[k - 1]
        for name, rho in correlations.items()
        for k in (1, 5, 15)
        if k <= len(rho)
    }
    return named if separation is None else {**named, "calibration/auroc": separation}


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)
