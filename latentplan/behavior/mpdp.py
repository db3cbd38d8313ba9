"""MPDP: model-based planning distilled to policy (Li et al. 2023).

SAC's policy improvement over H steps instead of one, through the model and jointly over one policy
per step; the first of them acts:

    J(s) = E[ sum_{i<L} d_i ((r_i - beta R u_i / U) / S + alpha H(pi_i(.|s_i))) + d_L V(s_L) / S ]
    d_0 = 1,  d_{i+1} = d_i * discount * c_{i+1}

The planner is gradient ascent on J; that only pi_0 is kept is the distillation. H = 1 is SAC. With
an adaptive horizon, L is the first step (from 1 on) into states that the model is too unsure of;
the value is taken where the rollout was cut, and nothing comes after a predicted end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentplan.behavior.imagine import Step, imagine, sampled
from latentplan.behavior.returns import discounts
from latentplan.nn.dists import ActionDist
from latentplan.types import Latent, Rollout, StepNoise

StepPolicy = Callable[[Latent, int], ActionDist]


class Improvement(NamedTuple):
    """The objective of N states, and what it is made of."""

    objective: Tensor  # (N,) J, to be climbed
    taken: Tensor  # (N, H) 1 for the steps taken before the value stands in
    penalty: Tensor  # (N,) what of J is the penalty for uncertainty, <= 0
    entropy: Tensor  # (H,) mean of H(pi_i) over the states that take step i


def roll_out(
    step: Step,
    policy: StepPolicy,
    start: Latent,
    horizon: int,
    noise: Tensor | None = None,
    step_noise: StepNoise | None = None,
) -> tuple[Rollout, Tensor]:
    """Follow pi_0 .. pi_{H-1} through the model, with gradients.

    Args:
        policy: latent (N), step h -> pi_h there. noise: (H, N, A) standard normal.

    Returns:
        The rollout (N, H), and the entropy of pi_h in the state left at h (N, H): its expectation
        is that of -log pi_h(a_h | s_h), its variance is less.
    """
    entropies = []

    def noted(latent: Latent, h: int) -> ActionDist:
        dist = policy(latent, h)
        entropies.append(dist.entropy())
        return dist

    rollout = imagine(step, sampled(noted, noise), start, horizon, step_noise)
    return rollout, torch.stack(entropies, 1)


def improve(
    rollout: Rollout,
    entropy: Tensor,
    value: Tensor,
    *,
    discount: float,
    alpha: Tensor | float,
    beta: float = 0.0,
    threshold: float | None = None,
    reward_scale: Tensor | float = 1.0,
    uncertainty_scale: Tensor | float = 1.0,
    price: Tensor | float = 1.0,
) -> Improvement:
    """J of a rollout's starts; gradients reach whatever made the rollout.

    Args:
        entropy: (N, H) from :func:`roll_out`.
        value: (N, H) soft value of the states arrived at, in units of reward.
        alpha: the entropy temperature. beta: of the penalty.
        threshold: in units of the uncertainty scale; None: all H steps are taken.
        reward_scale, uncertainty_scale: S and U.
        price: R, the reward that an uncertainty of U is set against.

    Raises:
        ValueError: a penalty or a threshold, but the rollout carries no uncertainty.
    """
    if rollout.uncertainty is None and (beta or threshold is not None):
        raise ValueError("The uncertainty that the objective asks for is not measured.")
    doubt = torch.zeros_like(entropy)
    if rollout.uncertainty is not None:
        doubt = rollout.uncertainty / uncertainty_scale
    taken = _taken(doubt.detach(), threshold)
    weight, after = discounts(rollout.cont, discount)
    arrive = torch.cat([weight[:, 1:], after[:, None]], 1)  # d_{h+1}, of the state arrived at
    last = taken - torch.cat([taken[:, 1:], torch.zeros_like(taken[:, :1])], 1)
    penalty = -beta * price / reward_scale * (taken * weight * doubt).sum(1)
    gain = taken * weight * (rollout.reward / reward_scale + alpha * entropy)
    end = last * arrive * value / reward_scale
    return Improvement(
        gain.sum(1) + penalty + end.sum(1),
        taken,
        penalty.detach(),
        (taken * entropy).sum(0).detach() / taken.sum(0).clamp(min=1),
    )


def _taken(doubt: Tensor, threshold: float | None) -> Tensor:
    """(N, H) 1 for the steps before the first one, from the second on, that is too uncertain."""
    if threshold is None:
        return torch.ones_like(doubt)
    sure = (doubt <= threshold).to(doubt.dtype)
    sure[:, 0] = 1.0  # without a first step there would be nothing to improve
    return sure.cumprod(1)


def mpdp_metrics(found: Improvement) -> dict[str, Tensor]:
    """Horizon used, what the penalty makes of the objective, the entropy of each step's policy."""
    share = found.penalty.abs() / (found.objective.detach().abs() + found.penalty.abs() + 1e-8)
    entropies = {f"train/mpdp/entropy_{h}": x for h, x in enumerate(found.entropy)}
    return {
        "train/mpdp/horizon": found.taken.sum(1).mean(),
        "train/mpdp/penalty_share": share.mean(),
        **entropies,
    }
