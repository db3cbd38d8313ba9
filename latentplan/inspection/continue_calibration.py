"""Measures whether the predicted probability that an episode continues is calibrated.

Held-out episodes are filtered row by row. The probability is read off the posterior of a row (0
decisions ahead), and after k imagined decisions along the recorded actions, as the mean over the
rollouts. A rollout counts as much as the model believes that it has lasted so far, because the
recorded episode has. The probability is compared with whether the row was terminal.

Calibrated means: of the rows with a predicted probability of about p, a share of about p continued.
A terminal row is rare, so the bins are compared by the number of ends: the number that happened,
and the sum of the predicted probabilities of an end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from scipy import stats
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior.imagination import follow, imagine
from latentplan.types import Latent, Timestep

AHEAD = (0, 1, 5)  # decisions that the model imagines before the prediction
EDGES = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1])  # of the bins
FEWEST_ENDS = 5  # happened or predicted, for a verdict
TOLERANCE = 0.2  # ends in the wrong bins, as a share of all ends
SIGNIFICANCE = 0.01  # of the difference between predicted and actual ends
_MIN_ROLLOUTS = 8  # per state; their mean is the prediction
_PIECE = 128  # states that are imagined from together, which bounds the memory


@torch.no_grad()
def predicted_continues(agent: Agent, rows: Timestep) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Predictions and outcomes in consecutive rows of one environment.

    Args:
        agent: the agent.
        rows: (T, 1) numpy arrays.

    Returns:
        For each number of decisions ahead in ``AHEAD``: the predicted probabilities that the
        episode continues, and whether it did, both (R,).
    """
    world, total = agent.world, len(rows.reward)
    rows = rows.to(agent.device)
    latent, latents = world.initial(1), []
    for t in range(total):
        latent = world.filter(rows.map(itemgetter(t)), latent)
        latents.append(latent)
    states = Latent(*(torch.cat(x) for x in zip(*latents, strict=True)))
    continued = ~rows.is_terminal[:, 0].bool().cpu().numpy()
    episode = rows.is_first[:, 0].long().cumsum(0).cpu().numpy()
    _, cont = world.outcome(world.features(states))
    result = {0: (cont.cpu().numpy(), continued)}
    imagined = torch.cat(
        [_imagined(agent, states, rows.prev_action[:, 0], x) for x in _pieces(total, agent.device)]
    )
    for k in AHEAD[1:]:
        within = episode[k:] == episode[: total - k]
        result[k] = imagined[: total - k, k - 1].cpu().numpy()[within], continued[k:][within]
    return result


def _pieces(total: int, device: torch.device) -> Sequence[Tensor]:
    return torch.arange(total, device=device).split(_PIECE)


def _imagined(agent: Agent, states: Latent, action: Tensor, start: Tensor) -> Tensor:
    """Probabilities of continuing (N, max(AHEAD)), from the states number ``start`` (N).

    Args:
        states: (T) posterior states of consecutive rows.
        action: (T, A) the actions that led to the rows.
    """
    world, horizon = agent.world, max(AHEAD)
    count = -(-_MIN_ROLLOUTS // world.config.members) * world.config.members
    steps = start[:, None] + 1 + torch.arange(horizon, device=start.device)
    actions = action[steps.clamp(max=len(action) - 1)]  # past the end, nothing is compared
    # Each block of rows is moved by one member, so every member moves every state equally often.
    rollout = imagine(
        world.step_unmeasured,
        follow(repeat(actions, "n h a -> (s n) h a", s=count)),
        states.map(lambda x: repeat(x[start], "n ... -> (s n) ...", s=count)),
        horizon,
        world.draw_noise(count * len(start), horizon),
    )
    cont = rearrange(rollout.cont, "(s n) h -> s n h", s=count)
    lasted = torch.cat([torch.ones_like(cont[..., :1]), cont[..., :-1]], -1).cumprod(-1)
    weight = lasted.clamp(min=1e-6)
    return (weight * cont).sum(0) / weight.sum(0)


def continue_reliability(predicted: np.ndarray, continued: np.ndarray) -> dict[str, Any]:
    """Compare predicted probabilities of continuing with what happened.

    Args:
        predicted: (R,) probabilities.
        continued: (R,) bool.

    Returns:
        - ``bins``: lists over the bins of ``EDGES`` that have rows. ``predicted`` is the mean,
          ``happened`` the share that continued, ``error`` the standard error of that share if the
          predictions are right, and ``rows`` the number of rows.
        - ``ends`` and ``predicted_ends``: the numbers of ends that happened and were predicted.
        - ``mismatch``: the difference between them, summed over the bins, divided by the larger.
        - ``p_value``: the probability of such a difference if the predictions are right
          (chi-squared).
        - ``overconfidence``: above 0 if the outcomes were less one-sided than predicted, in rows.
    """
    p = np.clip(predicted.astype(float), 1e-6, 1 - 1e-6)
    which = np.digitize(p, EDGES[1:-1])
    kept = np.unique(which)
    sums = [[x[which == b].sum() for b in kept] for x in (np.ones_like(p), p, continued)]
    rows, expected, actual = map(np.array, sums)
    variance = np.array([(p * (1 - p))[which == b].sum() for b in kept])
    ends, predicted_ends = float((~continued).sum()), float((1 - p).sum())
    difference = expected - actual
    return {
        "bins": {
            "predicted": (expected / rows).tolist(),
            "happened": (actual / rows).tolist(),
            "error": (np.sqrt(variance) / rows).tolist(),
            "rows": rows.astype(int).tolist(),
        },
        "ends": int(ends),
        "predicted_ends": predicted_ends,
        "mismatch": float(np.abs(difference).sum() / max(ends, predicted_ends)),
        "p_value": float(stats.chi2.sf((difference**2 / variance).sum(), len(kept))),
        "overconfidence": float((np.sign(expected / rows - 0.5) * difference).sum()),
    }


def calibrate_continue(agent: Agent, rows: Timestep) -> dict[str, dict[str, Any]] | None:
    """:func:`continue_reliability` for each number of decisions in ``AHEAD``, as a text.

    Args:
        agent: the agent.
        rows: (T, 1) consecutive rows, numpy arrays.

    Returns:
        None if no row is terminal.
    """
    if not rows.is_terminal.any():
        return None
    predictions = predicted_continues(agent, rows)
    return {str(k): continue_reliability(*x) for k, x in predictions.items()}


def continue_verdict(by_ahead: Mapping[str, Mapping[str, Any]] | None) -> str:
    """What the result of :func:`calibrate_continue` means, in one sentence."""
    if by_ahead is None:
        return (
            "No held-out episode terminated, so the predicted probability that an episode "
            "continues was not tested."
        )
    found = {k: _kind(x) for k, x in by_ahead.items()}
    if "few" in found.values():
        return (
            f"Fewer than {FEWEST_ENDS} held-out episodes terminated, too few to judge the "
            "predicted probability that an episode continues."
        )
    wrong = [k for k, kind in found.items() if kind != "calibrated"]
    k = wrong[0] if wrong else list(by_ahead)[-1]
    fact = (
        f"{by_ahead[k]['predicted_ends']:.1f} ends predicted and {by_ahead[k]['ends']} happened, "
        f"{k} decisions ahead"
    )
    if not wrong:
        return f"The predicted probability that an episode continues is calibrated ({fact})."
    return (
        f"The predicted probability that an episode continues is {found[k]} ({fact}; "
        f"{by_ahead[k]['mismatch']:.0%} of the ends are in the wrong bins)."
    )


def _kind(result: Mapping[str, Any]) -> str:
    if max(result["ends"], result["predicted_ends"]) < FEWEST_ENDS:
        return "few"
    if result["mismatch"] <= TOLERANCE or result["p_value"] >= SIGNIFICANCE:
        return "calibrated"
    return "too sure" if result["overconfidence"] > 0 else "not sure enough"


def draw_continue(axis: Any, by_ahead: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the share of rows that continued against the predicted probability.

    Args:
        axis: of matplotlib.
        by_ahead: a result of :func:`calibrate_continue`.
    """
    axis.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle="--", label="calibrated")
    for k, result in by_ahead.items():
        bins = result["bins"]
        axis.errorbar(
            bins["predicted"],
            bins["happened"],
            2 * np.array(bins["error"]),
            marker="o",
            capsize=2,
            label=f"{k} ahead: {result['predicted_ends']:.1f} ends predicted, "
            f"{result['ends']} happened",
        )
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("predicted probability that the episode continues")
    axis.set_ylabel("share of decisions after which it did")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
