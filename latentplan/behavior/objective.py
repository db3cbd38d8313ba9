"""What the learner knows of the actor's objective.

There are three: Dreamer's (``dreamer.py``), and MPDP's with one policy for all steps or with one
policy per step (``mpdp.py``). The agent chooses one by its configuration.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from latentplan.behavior.conservative import PlannedActing
from latentplan.behavior.losses import Planned, Target
from latentplan.config.schema import Config
from latentplan.nn.action_distributions import PolicyDist
from latentplan.types import Latent, Rollout


class Dream(NamedTuple):
    """An imagined rollout and what is computed from it before any loss."""

    rollout: Rollout  # (N, H)
    acting: PlannedActing | None  # the conservative planner, where one acted
    features: Tensor  # (N, H, F) of the states left
    slow: Tensor  # (C, N, H+1) values of the slow critics
    value: Tensor  # (N, H+1) the smallest of them
    dist: PolicyDist  # (N, H) the policy at the states left, on detached features
    target: Target


class ActorLoss(NamedTuple):
    """The actor's loss, and what else the learner needs to know of it."""

    loss: Tensor  # ()
    weight: Tensor  # (N, H) of the states of the rollout, where plans may be distilled
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """How the actor is improved from imagined rollouts."""

    differentiable: bool  # gradients flow through the rollout that the critic learns from
    soft: bool  # the critic learns the policy's own value, in which entropy is a reward
    candidate_lam: float | None  # see :func:`latentplan.behavior.conservative.learn_from_plans`
    states_per_rollout: int  # states of a rollout that the loss averages over

    @staticmethod
    def num_policies(config: Config) -> int:
        """Policies of the actor: one, or one per future step."""

    @staticmethod
    def entropy_bonus(config: Config) -> float:
        """What a nat of entropy earns, in units of the return scale."""

    def imagine(self, start: Latent) -> tuple[Rollout, PlannedActing | None]:
        """The rollout (N, H) that the critic learns from, and the planner that acted in it."""

    def actor_loss(self, dream: Dream, planned: Planned | None, baseline: Tensor) -> ActorLoss:
        """The loss of the actor.

        Args:
            planned: what planned rows change, where some are.
            baseline: (N, H) the critic's values of the states left.
        """
