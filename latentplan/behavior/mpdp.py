"""MPDP: model-based planning distilled to policy (Li et al. 2023).

SAC's policy improvement over H steps instead of one, through the model and jointly over one policy
per step; the first of them acts:

    J(s) = E[ sum_{i<L} d_i ((r_i - beta R u_i / U) / S + alpha H(pi_i(.|s_i))) + d_L V(s_L) / S ]
    d_0 = 1,  d_{i+1} = d_i * discount * c_{i+1}

The planner is gradient ascent on J. Only pi_0 is kept, which is the distillation. H = 1 is SAC.
With an adaptive horizon, L is the first step (from 1 on) whose uncertainty exceeds the threshold.
The value is taken where the rollout was cut, and nothing comes after a predicted end.

The rollouts of ``behavior.horizon`` steps are cut into windows of ``mpdp.horizon`` steps. Each
window improves its first state, weighted by the discounted probability of reaching it, and no
gradient crosses its border. One window per rollout is the paper's form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from latentplan.behavior.behavior import Behavior, frozen
from latentplan.behavior.conservative import PlannedActing
from latentplan.behavior.imagination import Step, imagine, sampled
from latentplan.behavior.losses import Planned
from latentplan.behavior.objective import ActorLoss, Dream
from latentplan.behavior.returns import discounts
from latentplan.config.schema import Config
from latentplan.nn.action_distributions import PolicyDist
from latentplan.nn.distributed import mean_over_ranks
from latentplan.types import Latent, Rollout, StepNoise

StepPolicy = Callable[[Latent, int], PolicyDist]


class Improvement(NamedTuple):
    """The objective of N states, and its parts."""

    objective: Tensor  # (N,) J, to be maximized
    taken: Tensor  # (N, H) 1 for the steps before the value replaces the rest
    penalty: Tensor  # (N,) the part of J that is the penalty for uncertainty, <= 0
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
        The rollout (N, H), and the entropy of pi_h in the state left at h (N, H). The entropy has
        the expectation of -log pi_h(a_h | s_h) and less variance.
    """
    entropies = []

    def noted(latent: Latent, h: int) -> PolicyDist:
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
    reward_magnitude: Tensor | float = 1.0,
) -> Improvement:
    """The objective J of the first states of rollouts, differentiable through the rollouts.

    Args:
        entropy: (N, H) from :func:`roll_out`.
        value: (N, H) soft value of the states arrived at, in units of reward.
        alpha: the entropy temperature.
        beta: weight of the penalty for uncertainty.
        threshold: in units of the uncertainty scale; None: all H steps are taken.
        reward_scale, uncertainty_scale: S and U.
        reward_magnitude: R, the reward that weighs as much as an uncertainty of U.

    Raises:
        ValueError: there is a penalty or a threshold, but the rollout carries no uncertainty.
    """
    if rollout.uncertainty is None and (beta or threshold is not None):
        raise ValueError("The objective needs the uncertainty, which was not measured.")
    uncertainty = torch.zeros_like(entropy)
    if rollout.uncertainty is not None:
        uncertainty = rollout.uncertainty / uncertainty_scale
    taken = _taken(uncertainty.detach(), threshold)
    weight, after = discounts(rollout.cont, discount)
    arrive = torch.cat([weight[:, 1:], after[:, None]], 1)  # d_{h+1}, of the state arrived at
    last = taken - torch.cat([taken[:, 1:], torch.zeros_like(taken[:, :1])], 1)
    penalty = -beta * reward_magnitude / reward_scale * (taken * weight * uncertainty).sum(1)
    gain = taken * weight * (rollout.reward / reward_scale + alpha * entropy)
    end = last * arrive * value / reward_scale
    return Improvement(
        gain.sum(1) + penalty + end.sum(1),
        taken,
        penalty.detach(),
        (taken * entropy).sum(0).detach() / taken.sum(0).clamp(min=1),
    )


def _taken(uncertainty: Tensor, threshold: float | None) -> Tensor:
    """(N, H) 1 for the first step, and for the later ones up to the first that is too uncertain."""
    if threshold is None:
        return torch.ones_like(uncertainty)
    certain = (uncertainty <= threshold).to(uncertainty.dtype)
    certain[:, 0] = 1.0  # the objective needs at least one step
    return certain.cumprod(1)


def mpdp_metrics(improvement: Improvement) -> dict[str, Tensor]:
    """The mean horizon, the penalty's fraction of the objective, and the entropy of each step."""
    share = improvement.penalty.abs() / (
        improvement.objective.detach().abs() + improvement.penalty.abs() + 1e-8
    )
    entropies = {f"train/mpdp/entropy_{h}": x for h, x in enumerate(improvement.entropy)}
    return {
        "train/mpdp/horizon": improvement.taken.sum(1).mean(),
        "train/mpdp/penalty_share": share.mean(),
        **entropies,
    }


class _MpdpObjective:
    """What MPDP with shared policies and MPDP with one policy per step have in common."""

    soft = True
    candidate_lam: float | None = 0.0  # the objective counts every action once

    def __init__(self, behavior: Behavior):
        self.behavior, self.config = behavior, behavior.config.mpdp
        self.discount, self.horizon = (
            behavior.config.behavior.discount,
            behavior.config.behavior.horizon,
        )
        self.states_per_rollout = self.horizon // self.config.horizon
        self.measured = bool(self.config.beta or self.config.adaptive_horizon)

    @staticmethod
    def entropy_bonus(config: Config) -> float:
        return config.behavior.entropy_bonus * config.mpdp.entropy_fraction

    def _windows(self, x: Tensor) -> Tensor:
        """The whole windows of a rollout, a row each: (N, T, ...) -> (N W, mpdp.horizon, ...)."""
        count = self.states_per_rollout
        whole = x[:, : count * self.config.horizon]
        return rearrange(whole, "n (w h) ... -> (n w) h ...", w=count)

    def _improve(self, rollout: Rollout, entropy: Tensor, value: Tensor) -> Improvement:
        """:func:`improve` of windows (N W, mpdp.horizon), in the units of the agent."""
        b, c = self.behavior, self.config
        return improve(
            rollout,
            entropy,
            value,
            discount=self.discount,
            alpha=b.temperature.value,
            beta=c.beta,
            threshold=c.threshold if c.adaptive_horizon else None,
            reward_scale=b.return_scale.value,
            uncertainty_scale=b.uncertainty_scale.value,
            reward_magnitude=mean_over_ranks(rollout.reward.detach().abs().mean()),
        )


class SharedMpdp(_MpdpObjective):
    """MPDP with one policy for all steps, in the rollout that the critic learns from."""

    differentiable = True

    @staticmethod
    def num_policies(config: Config) -> int:
        return 1

    def imagine(self, start: Latent) -> tuple[Rollout, PlannedActing | None]:
        return self.behavior.imagine(
            start,
            self.horizon,
            measured=self.measured,
            attached=True,
            window=self.config.horizon,
        )

    def actor_loss(self, dream: Dream, planned: Planned | None, baseline: Tensor) -> ActorLoss:
        weight = self._windows(dream.target.weight)
        rollout, entropy, value = self._cut(dream, planned)
        improvement = self._improve(rollout, entropy, value)
        gain = weight[:, 0] * improvement.objective
        if planned is not None:
            gain = gain + (weight * improvement.taken * self._windows(planned.gain)).sum(1)
        taught = dream.target.weight * self._taken(improvement)
        return ActorLoss(-gain.mean(), taught, mpdp_metrics(improvement))

    def _cut(self, dream: Dream, planned: Planned | None) -> tuple[Rollout, Tensor, Tensor]:
        """The windows (N W, mpdp.horizon) of a rollout, the policy's entropy there, and values."""
        windows, whole = self._windows, dream.rollout
        rollout = whole._replace(
            reward=windows(whole.reward),
            cont=windows(whole.cont),
            uncertainty=None if whole.uncertainty is None else windows(whole.uncertainty),
        )
        value, features = windows(dream.value[:, 1:]), windows(dream.features)
        # The rollout's gradient was cut at the start of each window.
        features = torch.cat([features[:, :1].detach(), features[:, 1:]], 1)
        with self.behavior.world.autocast():
            entropy = self.behavior.actor(features).entropy()
        if planned is not None:  # where a candidate is merely followed the actor does not climb
            entropy = torch.where(windows(planned.learns) > 0, entropy, entropy.detach())
        return rollout, entropy, value

    def _taken(self, improvement: Improvement) -> Tensor:
        """(N, H) 1 for the steps of a rollout that its windows improve, before each one's cut."""
        taken = rearrange(improvement.taken, "(n w) h -> n (w h)", w=self.states_per_rollout)
        return functional.pad(taken, (0, self.horizon - taken.shape[1]))


class PerStepMpdp(_MpdpObjective):
    """MPDP with one policy per future step, as in the paper, in rollouts of its own.

    The critic learns from another rollout, which follows the first policy alone.
    """

    differentiable = False

    @staticmethod
    def num_policies(config: Config) -> int:
        return config.mpdp.horizon

    def imagine(self, start: Latent) -> tuple[Rollout, PlannedActing | None]:
        return self.behavior.imagine(start, self.horizon, plan=False)

    def actor_loss(self, dream: Dream, planned: Planned | None, baseline: Tensor) -> ActorLoss:
        b, steps = self.behavior, self.config.horizon
        weight = self._windows(dream.target.weight)
        start = dream.rollout.latent.map(lambda x: self._windows(x[:, :-1])[:, 0])
        noise = b.world.draw_noise(weight.shape[0], steps)
        step = b.world.step if self.measured else b.world.step_unmeasured
        with frozen(b.world), b.world.autocast():
            policy = partial(b.policy, attached=True)
            rollout, entropy = roll_out(step, policy, start, steps, step_noise=noise)
            value = b.critic.slow_values(b.world.features(rollout.latent)[:, 1:]).amin(0)
        improvement = self._improve(rollout, entropy, value)
        loss = -(weight[:, 0] * improvement.objective).mean()
        return ActorLoss(loss, dream.target.weight, mpdp_metrics(improvement))
