"""Measures of the ensemble's disagreement about the state that an action leads to.

All measures compare probabilities or means, never samples. Noise on which all members agree counts
as nothing, so the measures are epistemic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentplan.nn.distributed import mean_over_ranks, world_size
from latentplan.nn.ensemble import EnsembleMLP


def _entropy(p: Tensor) -> Tensor:
    """The entropy in nats, averaged over groups: (..., S, C) -> (...)."""
    return -(p * p.log()).flatten(-2).sum(-1) / p.shape[-2]  # one long sum is fastest


def jsd(p: Tensor) -> Tensor:
    """Jensen-Shannon divergence H(mean_m p_m) - mean_m H(p_m), averaged over groups.

    Args:
        p: (M, N, S, C) probabilities, all positive.

    Returns:
        (N,) nats, from 0 to ln M.
    """
    return _entropy(p.mean(0)) - _entropy(p).mean(0)


def member_std(p: Tensor) -> Tensor:
    """Standard deviation over members, averaged over all other axes: (M, N, ...) -> (N,).

    It is written out, because ``torch.std`` over a leading axis takes 30 times as long on a CPU.
    """
    variance = (p.square().mean(0) - p.mean(0).square()).clamp(min=1e-12)
    return variance.sqrt().flatten(1).mean(-1)


def kl_rest(p: Tensor) -> Tensor:
    """MPDP's one-versus-rest disagreement sum_m KL[p_m || mean of the others].

    Args:
        p: (M, N, S, C) probabilities, all positive.

    Returns:
        (N,) nats, averaged over groups.
    """
    # This is M - 1 times the mean of the others. The ratio then needs one logarithm, and since
    # every p sums to one, the factor is the constant that is added at the end.
    rest = p.sum(0) - p
    ratio = (p * (p / rest).log()).flatten(-2).sum(-1).sum(0) / p.shape[-2]
    return ratio + p.shape[0] * math.log(p.shape[0] - 1)


MEASURES = {"jsd": jsd, "std": member_std, "kl_rest": kl_rest}


class Probes(nn.Module):
    """M MLPs that predict the next posterior sample from features and action (Plan2Explore).

    Inputs are detached, so the probes do not change the world model.
    """

    def __init__(self, members: int, features: int, action_dim: int, units: int, outputs: int):
        super().__init__()
        self.net = EnsembleMLP(members, features + action_dim, units, 2, outputs)

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """(N, F), (N, A) -> (M, N, S*C)."""
        return self.net(torch.cat([features, action], -1)).float()

    def uncertainty(self, features: Tensor, action: Tensor) -> Tensor:
        """(N,) Standard deviation of the members' predictions, averaged over dimensions."""
        return member_std(self(features, action))

    def loss(
        self, features: Tensor, action: Tensor, target: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean squared error where ``mask`` is true, and the uncertainty (N,) of the rows.

        Args:
            features: (N, F) before the action.
            action: (N, A).
            target: (N, S*C) after the action.
            mask: (M, N) bool, the rows that each member learns from.
        """
        prediction = self(features.detach(), action)
        error = F.mse_loss(
            prediction, target.detach().expand_as(prediction), reduction="none"
        ).mean(-1)
        # Ranks differ in the number of rows that their members learn from.
        count = mean_over_ranks(mask.sum()).clamp(min=1 / world_size())
        return (error * mask).sum() / count, member_std(prediction.detach())
