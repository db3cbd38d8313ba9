"""Dreamer's objective: the lambda-returns of imagined rollouts, and the entropy of the policy."""

from __future__ import annotations

from torch import Tensor

from latentplan.behavior.behavior import Behavior
from latentplan.behavior.conservative import PlannedActing
from latentplan.behavior.losses import Planned, actor_loss
from latentplan.behavior.objective import ActorLoss, Dream
from latentplan.config.schema import Config
from latentplan.types import Latent, Rollout


class DreamerObjective:
    """The objective of DreamerV3 ("Actor learning"), by score function or pathwise gradient."""

    soft = False

    def __init__(self, behavior: Behavior):
        self.behavior, self.config = behavior, behavior.config.behavior
        self.differentiable = self.config.gradient == "pathwise"
        self.candidate_lam = self.config.lam if self.differentiable else None
        self.states_per_rollout = self.config.horizon

    @staticmethod
    def num_policies(config: Config) -> int:
        return 1

    @staticmethod
    def entropy_bonus(config: Config) -> float:
        return config.behavior.entropy_bonus

    def imagine(self, start: Latent) -> tuple[Rollout, PlannedActing | None]:
        measured = bool(self.config.caution)
        return self.behavior.imagine(start, self.config.horizon, measured=measured)

    def actor_loss(self, dream: Dream, planned: Planned | None, baseline: Tensor) -> ActorLoss:
        scale, alpha = self.behavior.return_scale.value, self.behavior.temperature.value
        loss = actor_loss(
            dream.dist, dream.rollout, dream.target, baseline, scale, alpha, self.config, planned
        )
        return ActorLoss(loss, dream.target.weight, {})
