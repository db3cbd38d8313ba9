"""Layers. Weights start as a truncated normal of variance 1 / fan-in, biases at zero."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TRUNCATED_STD = 0.8796  # standard deviation of a unit normal truncated at +-2


@torch.no_grad()
def init_weight(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Fill in place with a truncated normal of standard deviation ``scale / sqrt(fan_in)``."""
    if scale == 0.0:
        weight.zero_()
    else:
        std = scale / math.sqrt(fan_in) / TRUNCATED_STD
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Linear(nn.Linear):
    """``nn.Linear`` with the initialization of this module; ``scale=0`` starts it at zero."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, scale: float = 1.0):
        self.scale = scale
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        init_weight(self.weight, self.in_features, self.scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """A block-diagonal linear map of G blocks: (G, N, inputs) -> (G, N, outputs)."""

    def __init__(self, blocks: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs, outputs))
        init_weight(self.weight, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` with its gain in the input's dtype, as the fused kernel needs it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(kind: str, size: int) -> nn.Module:
    """A normalization layer: ``rms`` (published), or ``layer`` (one fused kernel on a CPU)."""
    kinds = {"rms": RMSNorm, "layer": nn.LayerNorm}
    return kinds[kind](size, eps=1e-4)


class MLP(nn.Module):
    """Hidden layers (linear, norm, SiLU) and a linear output: (..., inputs) -> (..., outputs).

    ``scale=0`` makes the output start at exactly zero (DreamerV3's reward and value heads).
    """

    def __init__(
        self, inputs: int, units: int, layers: int, outputs: int, *, norm: str, scale: float = 1.0
    ):
        super().__init__()
        sizes = [inputs] + [units] * layers
        self.hidden = nn.ModuleList(Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(make_norm(norm, units) for _ in self.hidden)
        self.output = Linear(sizes[-1], outputs, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = F.silu(norm(linear(x)))
        return self.output(x)


class ChannelNorm(nn.Module):
    """Normalize every pixel over its channels: (N, C, H, W), channels last."""

    def __init__(self, kind: str, channels: int):
        super().__init__()
        self.norm = make_norm(kind, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        # With four axes, inductor would swap height and width, which is slow in the backward pass.
        return self.norm(pixels.flatten(0, 2)).view(pixels.shape).permute(0, 3, 1, 2)
