"""How well the world model of an agent predicts held-out episodes, for a diagnosis.

An *unexplained variance* is the mean squared error of a prediction, divided by the variance of what
it predicts. It is 0 for a perfect prediction, and 1 for the mean. In all results, which are plain
values for JSON, None stands for a number that does not exist.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from latentplan.agent import Agent
from latentplan.inspection.calibration import CONTEXT, k_step_errors, rank_correlations, windows
from latentplan.nn.distributions import symlog
from latentplan.types import Latent, Timestep

AHEAD = 5  # decisions that are predicted: about the horizon of a plan
ROWS = 256  # largest number of rows that are decoded: images of all rows would take gigabytes
SAMPLES = 8  # smallest number of imagined rollouts whose mean is the prediction
MIN_WINDOWS, MAX_WINDOWS = 10, 128  # windows in which the uncertainty is ranked
STILL = 1e-5  # standard deviation below which an entry differs only by rounding


class Visits(NamedTuple):
    """Held-out episodes, and the states of the agent in them."""

    rows: Timestep  # (N, T) tensors on the agent's device
    latent: Latent  # (N, T) posterior
    env: Tensor  # (R,) int64, with ``time`` the chosen rows, AHEAD rows or more into their episode
    time: Tensor  # (R,) int64

    def chosen(self, x: Tensor, back: int = 0) -> Tensor:
        """The entries (R, ...) of ``x`` (N, T, ...) that lie ``back`` rows before the chosen."""
        return x[self.env, self.time - back]

    def states(self, back: int = 0) -> Latent:
        """The states (R) that lie ``back`` rows before the chosen rows."""
        return self.latent.map(lambda x: self.chosen(x, back))


@torch.no_grad()
def visit(agent: Agent, rows: Timestep) -> Visits:
    """Filter rows (T, N) of episodes, as evaluation returns them, and choose some of them.

    At most ROWS rows are chosen, evenly spread. There are none if every episode is too short.
    """
    rows = rows.map(lambda x: np.swapaxes(x, 0, 1)).to(agent.device)
    episode = rows.is_first.cumsum(1)
    env, time = (episode[:, AHEAD:] == episode[:, :-AHEAD]).nonzero(as_tuple=True)
    chosen = torch.linspace(0, max(0, len(env) - 1), min(ROWS, len(env))).long().to(env.device)
    return Visits(rows, agent.world.observe(rows)[0], env[chosen], time[chosen] + AHEAD)


def unexplained(prediction: Tensor, truth: Tensor) -> Tensor:
    """The unexplained variance (D,) of D entries with P parts each, from R rows (R, D, P).

    It is NaN where the truth does not vary.
    """
    variance = truth.var(0, correction=0).sum(-1)
    error = (prediction - truth).square().mean(0).sum(-1)
    return torch.where(variance > STILL**2, error / variance, torch.nan)


@torch.no_grad()
def measure_model(agent: Agent, visits: Visits) -> dict[str, Any]:
    """Measure how well the model predicts observations.

    Returns:
        The unexplained variances by entry of a vector (``vector[0]``), and by image over all its
        pixels: ``now`` those of reconstructions from posterior states, ``ahead`` those of open-loop
        predictions AHEAD decisions before. Entries that do not vary are listed as ``constant``.
    """
    world = agent.world
    both = {"now": world.decode(visits.states()), "ahead": _predict_ahead(agent, visits)}
    result: dict[str, Any] = {"now": {}, "ahead": {}, "constant": []}
    for name in both["now"]:
        truth, image = visits.chosen(visits.rows.obs[name]).float(), name in world.spec.images
        truth = truth / 255.0 if image else symlog(truth)
        shape = "r ... -> r 1 (...)" if image else "r d -> r d 1"
        truth = rearrange(truth, shape)
        labels = [name] if image else [f"{name}[{i}]" for i in range(truth.shape[1])]
        for when, decoded in both.items():
            fractions = map(number, unexplained(rearrange(decoded[name], shape), truth))
            result[when] |= dict(zip(labels, fractions, strict=True))
    result["constant"] = [k for k, x in result["now"].items() if x is None]
    for when in both:
        result[when] = {k: x for k, x in result[when].items() if x is not None}
    return result


@torch.no_grad()
def measure_reward(agent: Agent, visits: Visits) -> dict[str, Any]:
    """Measure how well the model predicts rewards.

    Returns:
        The unexplained variances ``now`` and ``ahead``, as of :func:`measure_model`; None if the
        reward does not vary. ``rewarded`` is the fraction of rows with a reward other than 0.
    """
    world, rows = agent.world, visits.rows
    received = ~rows.is_first  # a first row has no reward
    reward, _ = world.outcome(world.features(visits.latent))
    ahead = _imagine_ahead(agent, visits).reward.mean(0)
    compare = lambda x, truth: number(unexplained(x[:, None, None], truth[:, None, None])[0])  # noqa: E731
    return {
        "now": compare(reward[received], rows.reward[received]),
        "ahead": compare(ahead, visits.chosen(rows.reward)),
        "rewarded": number((rows.reward[received] != 0).float().mean()),
    }


class _Ahead(NamedTuple):
    latent: Latent  # (S, R) S samples of the states at the R chosen rows
    reward: Tensor  # (S, R)


def _imagine_ahead(agent: Agent, visits: Visits) -> _Ahead:
    """Follow the recorded actions to the chosen rows, from the states AHEAD decisions before."""
    world, members = agent.world, agent.config.world.members
    count = -(-SAMPLES // members) * members  # every member leads as often as the others
    latent = visits.states(back=AHEAD).map(lambda x: repeat(x, "r ... -> (s r) ...", s=count))
    noise = world.draw_noise(latent.deter.shape[0], AHEAD)
    for h in range(AHEAD):
        action = visits.chosen(visits.rows.prev_action, back=AHEAD - 1 - h)
        action = repeat(action, "r a -> (s r) a", s=count)
        prediction = world.step_unmeasured(latent, action, noise.at(h))
        latent = prediction.latent
    split = lambda x: rearrange(x, "(s r) ... -> s r ...", s=count)  # noqa: E731
    return _Ahead(latent.map(split), split(prediction.reward))


def _predict_ahead(agent: Agent, visits: Visits) -> dict[str, Tensor]:
    """Observations {name: (R, *shape)}, predicted AHEAD decisions before the chosen rows.

    They are means over samples, since the mean has the smallest squared error.
    """
    latent = _imagine_ahead(agent, visits).latent
    total: dict[str, Tensor] = {}
    for sample in zip(*latent, strict=True):  # the images of all samples would take gigabytes
        for name, x in agent.world.decode(Latent(*sample)).items():
            total[name] = total[name] + x if name in total else x
    return {name: x / len(latent.deter) for name, x in total.items()}


def measure_uncertainty(agent: Agent, rows: Timestep) -> dict[str, Any]:
    """Rank correlations of the uncertainty with the latent error, 1 and AHEAD decisions ahead.

    ``left_out`` says why there are none, or is None.

    Args:
        rows: (T, N) numpy arrays.
    """
    if agent.config.world.uncertainty_members == 1:
        return {"left_out": "The ensemble has a single member, so there is no uncertainty."}
    held_out = windows(rows, CONTEXT + AHEAD, CONTEXT)
    count = len(held_out.reward)
    if count < MIN_WINDOWS:
        return {
            "left_out": f"The episodes have {count} windows of {CONTEXT + AHEAD} decisions, and "
            f"{MIN_WINDOWS} are needed to rank them: ask for more --episodes."
        }
    chosen = np.linspace(0, count - 1, min(count, MAX_WINDOWS)).astype(int)
    batch = held_out.map(lambda x: x[chosen]).to(agent.device)
    rho = rank_correlations(k_step_errors(agent, batch, CONTEXT, decode=False))["latent"]
    ranks = {str(k): number(rho[k - 1]) for k in (1, AHEAD)}
    return {"left_out": None, "windows": len(chosen), "rank_correlation": ranks}


def number(x: Tensor | float) -> float | None:
    """A plain number for JSON; None where it is not finite."""
    return float(x) if np.isfinite(float(x)) else None
