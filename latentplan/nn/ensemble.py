"""Ensembles with member-stacked weights: one batched product instead of a loop over members."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentplan.nn.layers import init_weight


class EnsembleLinear(nn.Module):
    """M linear maps side by side: (N, inputs) or (M, N, inputs) -> (M, N, outputs).

    Every member has its own random initialization; otherwise all members would stay equal.
    """

    def __init__(self, members: int, inputs: int, outputs: int, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))
        init_weight(self.weight, inputs, scale)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:  # the same input for every member
            x = x.expand(self.weight.shape[0], *x.shape)
        return torch.baddbmm(self.bias.to(x.dtype), x, self.weight.to(x.dtype))

    def one(self, x: Tensor, member: int) -> Tensor:
        """The output of one member: (..., inputs) -> (..., outputs)."""
        return F.linear(x, self.weight[member].T, self.bias[member, 0])


class EnsembleMLP(nn.Module):
    """M MLPs of ``layers`` hidden layers: (N, inputs) or (M, N, inputs) -> (M, N, outputs).

    The norm has no learned gain, since the weights of the next layer can express it.
    """

    def __init__(
        self, members: int, inputs: int, units: int, layers: int, outputs: int, scale: float = 1.0
    ):
        super().__init__()
        sizes = [inputs] + [units] * layers + [outputs]
        scales = [1.0] * layers + [scale]
        self.layers = nn.ModuleList(
            EnsembleLinear(members, a, b, s)
            for (a, b), s in zip(pairwise(sizes), scales, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
            x = F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-4))
        return self.layers[-1](x)

    def one(self, x: Tensor, member: int) -> Tensor:
        """The output of one member: (..., inputs) -> (..., outputs)."""
        *hidden, output = cast("list[EnsembleLinear]", list(self.layers))
        for layer in hidden:
            x = layer.one(x, member)
            x = F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-4))
        return output.one(x, member)


def bootstrap_mask(episode: Tensor, members: int, fraction: float) -> Tensor:
    """Which members learn from which episodes: (...) int64 -> (M, ...) bool.

    A fixed hash of (member, episode) decides, so that a member learns from the same episodes in
    every batch. A mask that is drawn anew for each batch would be no bootstrap. A single member
    learns from all episodes.
    """
    if members == 1:
        return torch.ones(1, *episode.shape, dtype=torch.bool, device=episode.device)
    member = torch.arange(members, device=episode.device).view(-1, *[1] * episode.ndim)
    x = (episode * 0x9E3779B1 + (member + 1) * 0x85EBCA77) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # 32-bit integer avalanche
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 15)) < int(fraction * 2**32)
