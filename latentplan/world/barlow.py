"""Representation without a decoder: the latent features predict the embedding (R2-Dreamer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentplan.nn.distributed import gather_rows
from latentplan.nn.layers import Linear

OFF_DIAGONAL = 5e-4  # published weight of the correlations of different dimensions


class Barlow(nn.Module):
    """The Barlow Twins loss between a projection of the features and the encoder's embedding."""

    def __init__(self, features: int, embed: int):
        super().__init__()
        self.project = Linear(features, embed, bias=False)

    def forward(self, features: Tensor, embed: Tensor) -> Tensor:
        """The loss () of rows (N, F), (N, X) of every rank, which correlations join.

        The embedding is a target and gets no gradient.
        """
        projected, target = self.project(features).float(), embed.detach().float()
        return barlow_loss(gather_rows(projected), gather_rows(target))


def barlow_loss(x: Tensor, y: Tensor) -> Tensor:
    """sum_i (C_ii - 1)^2 + 5e-4 sum_{i != j} C_ij^2, C the correlations of (N, X) and (N, X).

    Each dimension of x should correlate with the same dimension of y and with no other (Zbontar et
    al. 2021). A dimension that is constant over the rows correlates with nothing.
    """
    correlation = _standard(x).T @ _standard(y) / x.shape[0]
    on = torch.diagonal(correlation)
    off = correlation.square().sum() - on.square().sum()
    return (on - 1).square().sum() + OFF_DIAGONAL * off


def _standard(x: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over rows."""
    x = x - x.mean(0)
    return x * (x.square().mean(0) + 1e-5).rsqrt()
