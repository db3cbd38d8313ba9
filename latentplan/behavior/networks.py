"""What behavior learns: actor, critic, and the entropy temperature."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from latentplan.config.schema import BehaviorConfig
from latentplan.nn.action_distributions import ActionDist, CategoricalActions, PolicyDist
from latentplan.nn.distributions import TwoHot, symexp_bins
from latentplan.nn.ensemble import EnsembleMLP
from latentplan.nn.layers import MLP


class Actor(nn.Module):
    """(..., F) -> a distribution over actions (..., A).

    Args:
        policies: 1, or the number of policies pi_0 .. pi_{policies-1}, one per future step. The
            first one acts.
        groups: the numbers of choices of discrete actions; empty: they are continuous.
    """

    def __init__(
        self,
        features: int,
        action_dim: int,
        config: BehaviorConfig,
        norm: str,
        policies: int = 1,
        groups: tuple[int, ...] = (),
    ):
        super().__init__()
        self.config, self.policies, self.groups = config, policies, groups
        # What an entropy is a fraction or a multiple of: that of the uniform distribution over
        # discrete actions, or one nat for each dimension of continuous ones.
        self.entropy_unit = sum(map(math.log, groups)) if groups else float(action_dim)
        outputs = action_dim if groups else 2 * action_dim
        sizes = features, config.units, config.layers, outputs
        # Nearly zero output: the first policy is centered and equally wide everywhere.
        if policies == 1:
            self.net: MLP | EnsembleMLP = MLP(*sizes, norm=norm, scale=0.01)
        else:
            self.net = EnsembleMLP(policies, *sizes, scale=0.01)

    def forward(self, features: Tensor, step: int = 0) -> PolicyDist:
        if isinstance(self.net, EnsembleMLP):
            raw = self.net.one(features, step)
        else:
            raw = self.net(features)
        if self.groups:
            return CategoricalActions(raw, self.groups, self.config.unimix)
        return ActionDist(raw, self.config.std_min, self.config.std_max)


class Critic(nn.Module):
    """(..., F) -> C distributions over values, with a slow copy that makes targets.

    The critics see the same targets and differ by their random initialization, so their spread is
    largest where they extrapolate. A planner climbs such errors of a single critic: plans use the
    mean of the critics, and targets their minimum (TD3; TD-MPC2).
    """

    bins: Tensor

    def __init__(self, features: int, config: BehaviorConfig, norm: str):
        super().__init__()
        self.rate = config.slow_rate
        sizes = features, config.units, config.layers, config.bins
        if config.critics == 1:
            self.net: MLP | EnsembleMLP = MLP(*sizes, norm=norm, scale=0.0)
        else:
            self.net = EnsembleMLP(config.critics, *sizes, scale=0.0)
        self.slow_net = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("bins", symexp_bins(config.bins), persistent=False)

    def forward(self, features: Tensor) -> TwoHot:
        """Features (..., F) -> distributions over values (C, ...)."""
        return self._values(self.net, features)

    def slow_values(self, features: Tensor) -> Tensor:
        """The expected values by the slow copies: (..., F) -> (C, ...)."""
        return self._values(self.slow_net, features).mean()

    def slow_value(self, features: Tensor) -> Tensor:
        """The mean of the slow copies: (..., F) -> (...)."""
        return self.slow_values(features).mean(0)

    def _values(self, net: MLP | EnsembleMLP, features: Tensor) -> TwoHot:
        if isinstance(net, MLP):
            return TwoHot(net(features)[None], self.bins)
        logits = net(features.flatten(0, -2))
        return TwoHot(logits.unflatten(1, features.shape[:-1]), self.bins)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the slow copy towards the critic by its rate."""
        torch._foreach_lerp_(
            list(self.slow_net.parameters()), list(self.net.parameters()), self.rate
        )


class Temperature(nn.Module):
    """The entropy temperature alpha: fixed, or tuned to a target entropy (SAC, 2018).

    Args:
        alpha: the fixed or the initial value.
        target: nats; None keeps alpha fixed.
    """

    def __init__(self, alpha: float, target: float | None):
        super().__init__()
        self.target = target
        log_alpha = torch.tensor(alpha).log()
        if target is None:
            self.register_buffer("log_alpha", log_alpha, persistent=False)  # a setting, not learned
        else:
            self.log_alpha = nn.Parameter(log_alpha)

    @property
    def value(self) -> Tensor:
        """() alpha, detached."""
        return self.log_alpha.detach().exp()

    def loss(self, entropy: Tensor) -> Tensor:
        """The loss () whose gradient raises alpha while ``entropy`` (...) is below the target."""
        if self.target is None:
            raise ValueError("A fixed temperature has no loss.")
        return self.log_alpha * (entropy.detach().mean() - self.target)
