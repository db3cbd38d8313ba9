"""Measures whether the model's uncertainty predicts the model's errors.

In open loop, the model filters ``context`` rows of a window. It then predicts k steps ahead along
the recorded actions. The ensemble's disagreement, summed over these steps, is compared with the
errors after k steps:

- latent: total variation between predicted and posterior distributions, mean over groups, in [0, 1]
- reward: absolute error
- images or vectors: squared error of the decoded observation, summed

A useful uncertainty has a clearly positive rank correlation with the errors. World models are
pulled towards states that they know, so the disagreement can be low exactly where the error is
high. This report detects that.
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

CONTEXT, HORIZON = 8, 15  # rows that the model filters, and decisions that it then predicts
MIN_ROLLOUTS = 8  # smallest number of rollouts per window; their mean is the prediction


def windows(rows: Timestep, length: int, stride: int) -> Timestep:
    """Cut rows (T, N) into windows (B, length), each within one episode.

    Args:
        rows: numpy arrays.
        length: rows of a window.
        stride: a window begins every ``stride`` rows of an episode.

    Returns:
        Numpy arrays. B is 0 if every episode is shorter than ``length``.
    """
    total, count = rows.is_first.shape
    begins: list[list[int]] = [[], []]
    for n in range(count):
        firsts = [*np.flatnonzero(rows.is_first[:, n]), total]
        for first, end in pairwise(firsts):
            begins_of_episode = range(first, end - length + 1, stride)
            begins[0] += begins_of_episode
            begins[1] += [n] * len(begins_of_episode)
    time, env = (np.array(x, dtype=int)[:, None] for x in begins)
    return rows.map(lambda x: x[time + np.arange(length), env])


class KStepErrors(NamedTuple):
    """Uncertainty and errors of B windows, 1 .. H steps ahead. All arrays are (B, H)."""

    uncertainty: Tensor  # sum over the steps so far
    errors: dict[str, Tensor]


@torch.no_grad()
def k_step_errors(agent: Agent, rows: Timestep, context: int, decode: bool = True) -> KStepErrors:
    """Compute uncertainty and errors 1 .. T - context steps ahead.

    Args:
        agent: the agent.
        rows: (B, T) held-out rows, each window within one episode.
        context: rows that the model filters before it predicts.
        decode: whether to include the errors of decoded observations.
    """
    world, n = agent.world, rows.reward.shape[0]
    members = world.config.members
    count = -(-MIN_ROLLOUTS // members) * members  # every member leads as often as the others
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
    for h in range(horizon):  # the images of all steps together would take gigabytes
        arrived = Latent(rollout.latent.deter[:, h + 1], rollout.latent.stoch[:, h + 1])
        priors = world.rssm.prior_logits(arrived.deter).float()
        prior_of_member = priors[member, torch.arange(len(member), device=agent.device)]
        predicted, posterior_probs = (
            mixed_probs(x, world.config.unimix) for x in (prior_of_member, logits[:, context + h])
        )
        errors["latent"][:, h] = (mean(predicted) - posterior_probs).abs().sum(-1).mean(-1) / 2
        for name, decoded in world.decode(arrived).items() if decode else ():
            truth = rows.obs[name][:, context + h]
            truth = truth / 255.0 if name in world.spec.images else symlog(truth)
            error = (mean(decoded) - truth).square().flatten(1).sum(-1)
            errors.setdefault(name, torch.zeros_like(errors["latent"]))[:, h] = error
    return KStepErrors(mean(rollout.uncertainty).cumsum(1), errors)


def rank_correlations(result: KStepErrors) -> dict[str, list[float]]:
    """Spearman's rho of the uncertainty and each error, k = 1 .. H. NaN if one is constant."""
    uncertainty = result.uncertainty.cpu().numpy()
    return {
        name: [_spearman(uncertainty[:, k], error[:, k]) for k in range(uncertainty.shape[1])]
        for name, error in ((name, x.cpu().numpy()) for name, x in result.errors.items())
    }


def reliability(result: KStepErrors, k: int, bins: int = 10) -> dict[str, dict[str, list[float]]]:
    """Mean uncertainty and error of groups of windows, k steps ahead (k starts at 1).

    The windows are sorted by their uncertainty and divided into ``bins`` groups of equal size.
    """
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
def one_step_uncertainty(agent: Agent, rows: Timestep, context: int) -> np.ndarray:
    """Uncertainty of the recorded actions of rows (B, T), from row ``context`` on.

    Returns:
        (B * (T - context),).
    """
    posterior, _ = agent.world.observe(rows)
    before = posterior.map(lambda x: rearrange(x[:, context - 1 : -1], "b t ... -> (b t) ..."))
    action = rearrange(rows.prev_action[:, context:], "b t a -> (b t) a")
    uncertainty = agent.world.step(before, action).uncertainty
    assert uncertainty is not None  # `step` always computes it
    return uncertainty.cpu().numpy()


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Probability that an unknown state is more uncertain than a known one; 0.5 is chance.

    Args:
        known, unknown: uncertainties, one-dimensional.
    """
    u = stats.mannwhitneyu(unknown, known).statistic
    return float(u / (len(known) * len(unknown)))


def scalars(correlations: dict[str, list[float]], separation: float | None) -> dict[str, Any]:
    """TensorBoard scalars: correlations 1, 5 and 15 steps ahead (up to the horizon), and AUROC.

    Args:
        correlations: the result of :func:`rank_correlations`.
        separation: the result of :func:`auroc`, or None if it was not computed.
    """
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
