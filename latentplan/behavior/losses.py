"""The losses of actor and critic as pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentplan.behavior.networks import Critic
from latentplan.behavior.returns import lambda_returns
from latentplan.config.schema import BehaviorConfig
from latentplan.nn.action_distributions import PolicyDist
from latentplan.types import Rollout


class Target(NamedTuple):
    """Returns and weights of a rollout."""

    returns: Tensor  # (N, H) lambda-return from the state left at h
    weight: Tensor  # (N, H) discounted probability that the state left at h is reached


class Planned(NamedTuple):
    """The changes of the actor's loss in planned rows."""

    own: Tensor  # (N, H) 1 where the action was a sample of the policy, 0 where it was chosen
    learns: Tensor  # (N, H) 0 between plans, where the chosen candidate is followed, else 1
    gain: Tensor  # (N, H) gain from the candidates of a plan, 0 where there was no plan


def make_target(
    rollout: Rollout, value: Tensor, alive: Tensor, discount: float, lam: float
) -> Target:
    """Lambda-returns of a rollout and the weights of its states.

    Args:
        value: (N, H) of the states arrived at.
        alive: (N,) 0 where the start is terminal, else 1.
    """
    step_discount = discount * rollout.cont
    weight = torch.cat([alive.unsqueeze(1), step_discount[:, :-1]], 1).cumprod(1).detach()
    return Target(lambda_returns(rollout.reward, value, step_discount, lam), weight)


def actor_loss(
    dist: PolicyDist,
    rollout: Rollout,
    target: Target,
    baseline: Tensor,
    scale: Tensor,
    alpha: Tensor,
    config: BehaviorConfig,
    planned: Planned | None = None,
) -> Tensor:
    """The actor's loss () of DreamerV3 ("Actor learning").

    ``reinforce`` is the log-likelihood of the sampled action times its advantage. It is unbiased,
    and the world model needs no gradient. ``pathwise`` is the return itself, differentiated through
    the model's steps (straight-through at the discrete states). It has less noise and some bias.

    Args:
        dist: the policy at the states left, (N, H), on detached features.
        target: its returns carry the gradient that ``pathwise`` follows.
        baseline: (N, H) the critic's values of the states left.
        scale: () return scale S; entropy is paid in its units.
        alpha: () bonus per nat of entropy.
        planned: changes where a planner chose among samples of the policy (``conservative.py``).
    """
    if config.gradient == "reinforce":
        advantage = ((target.returns - baseline) / scale).detach()
        gain = dist.log_prob(rollout.choice.action.detach()) * advantage
        if planned is not None:
            gain = gain * planned.own
    else:
        gain = target.returns / scale
    entropy = alpha * dist.entropy()
    if planned is not None:
        gain = gain + planned.gain
        # Between plans the returns teach nothing, and entropy alone would widen the policy.
        entropy = entropy * planned.learns
    return -(target.weight * (gain + entropy)).mean()


def critic_loss(
    critic: Critic,
    features: Tensor,
    returns: Tensor,
    weight: Tensor,
    slow: Tensor,
    slow_scale: float,
) -> tuple[Tensor, Tensor]:
    """The critic's loss: the two-hot likelihood of the returns and of the slow critic's values.

    Args:
        features: (..., F) detached. returns, weight: (...).
        slow: (C, ...) the slow critics' values of the same states.
        slow_scale: weight of their likelihood.

    Returns:
        The loss (), averaged over critics, and their mean values (...).
    """
    value = critic(features)
    likelihood = value.log_prob(returns.detach()) + slow_scale * value.log_prob(slow.detach())
    return -(weight * likelihood).mean(), value.mean().mean(0).detach()


def replay_returns(
    reward: Tensor, bootstrap: Tensor, is_first: Tensor, is_terminal: Tensor, config: BehaviorConfig
) -> tuple[Tensor, Tensor]:
    """Lambda-returns along replayed rows, bootstrapped by imagination (DreamerV3's replay value).

    Args:
        reward, is_first, is_terminal: (B, T) rows. bootstrap: (B, T) the value of each row.

    Returns:
        returns (B, T-1) from rows 0 .. T-2, and weights (B, T-1): 0 where the next row is a reset.
    """
    discount = config.discount * (~is_terminal[:, 1:]).float()
    last = torch.cat([is_first[:, 2:], torch.ones_like(is_first[:, :1])], 1)
    returns = lambda_returns(reward[:, 1:], bootstrap[:, 1:], discount, config.lam, last)
    return returns, (~is_first[:, 1:]).float()


def distillation_loss(dist: PolicyDist, action: Tensor, score: Tensor, tau: float) -> Tensor:
    """Move the policy's mean towards the better of K scored candidates (not in the paper).

    The loss is -tau sum_k (w_k - 1/K) log pi(a_k) with w = softmax(score / tau). The baseline 1/K
    makes candidates of equal score teach nothing. Where scores differ by less than tau, this is the
    policy gradient of the score times 1 - 1/K. Larger differences count as tau. Of continuous
    actions only the mean learns: the better candidates lie on one side of it, and their distance
    from it would widen the policy even on a linear score.

    Args:
        dist: the policy, (..., A). action: (..., K, A), its samples. score: (..., K).

    Returns:
        (...)
    """
    weight = torch.softmax(score / tau, -1) - 1 / score.shape[-1]
    log_prob = dist.mean_only().map(lambda x: x[..., None, :]).log_prob(action)
    return -tau * (weight.nan_to_num(0.0).detach() * log_prob).sum(-1)
