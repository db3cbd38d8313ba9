"""Representation without a decoder: latent features must tell what the encoder saw (R2-Dreamer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentplan.nn.layers import Linear

OFF_DIAGONAL = 5e-4  # weight of what different dimensions share, as published


class Barlow(nn.Module):
    """Barlow Twins between a projection of the features and the encoder's embedding."""

    def __init__(self, features: int, embed: int):
        super().__init__()
        self.project = Linear(features, embed, bias=False)

    def forward(self, features: Tensor, embed: Tensor) -> Tensor:
        """() The loss of rows (N, F), (N, X); the embedding is a target and gets no gradient."""
        return barlow_loss(self.project(features).float(), embed.detach().float())


def barlow_loss(x: Tensor, y: Tensor) -> Tensor:
    """sum_i (C_ii - 1)^2 + 5e-4 sum_{i != j} C_ij^2, C the correlations of (N, X) and (N, X).

    Every dimension of the one should say what that dimension of the other says, and nothing else
    (Zbontar et al. 2021). A dimension that is constant over the rows correlates with nothing.
    """
    correlation = _standard(x).T @ _standard(y) / x.shape[0]
    on = torch.diagonal(correlation)
    off = correlation.square().sum() - on.square().sum()
    return (on - 1).square().sum() + OFF_DIAGONAL * off


def _standard(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over rows."""
    x = x - x.mean(0)
    return x * (x.square().mean(0) + 1e-5).rsqrt()
