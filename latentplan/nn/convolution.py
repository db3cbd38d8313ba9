"""Convolutions that halve or double a feature map.

On a CPU in bfloat16, the gradient of the filters is computed by matrix products, which take 0.5 to
0.7 of oneDNN's time (1024 maps; AMD EPYC and Intel Xeon; docs/performance.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from latentplan.nn.cache import cached_rows

KERNEL, STRIDE, PADDING = 4, 2, 1
WINDOWS = 2**21  # numbers of windows that are copied at a time: 4 MiB, which stay in the cache
PIECES = 2  # products over parts of the rows: one product over all rows is slower


class HalvingConv(nn.Conv2d):
    """4 x 4, stride 2: (N, inputs, H, W) -> (N, outputs, H / 2, W / 2)."""

    bias: nn.Parameter

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, KERNEL, stride=STRIDE, padding=PADDING)

    def forward(self, x: Tensor) -> Tensor:
        if not _by_product(x, x.shape[-2:].numel() // STRIDE**2, self.in_channels):
            return super().forward(x)
        out = _Convolution.apply(x, self.weight.to(x.dtype), False)
        return out + self.bias.to(x.dtype).view(-1, 1, 1)


class DoublingConv(nn.ConvTranspose2d):
    """Transposed 4 x 4, stride 2, no bias: (N, inputs, H, W) -> (N, outputs, 2 H, 2 W)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, KERNEL, stride=STRIDE, padding=PADDING, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not _by_product(x, x.shape[-2:].numel(), self.out_channels):
            return super().forward(x)
        return _Convolution.apply(x, self.weight.to(x.dtype), True)


def _by_product(x: Tensor, positions: int, channels: int) -> bool:
    """Whether the filters' gradient is faster by products.

    It is so on a CPU in bfloat16, where the smaller map has at most twice as many positions as the
    larger one has channels: the time is 0.7 to 0.9 of oneDNN's there, and about 1 beyond.
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and positions <= 2 * channels


class _Convolution(torch.autograd.Function):
    """A convolution that computes the gradient of its filters by matrix products.

    For 128 x 64 filters and 1024 maps of 4 x 4 in bfloat16, oneDNN takes 9 to 15 ms for that
    gradient, and copied windows with their products take 6 (AMD EPYC). On a Xeon with AMX it is 52
    against 22.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        return _convolve(x, weight, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        own = weight_gradient(*(grad, x) if ctx.transposed else (x, grad))
        own = rearrange(own, "o (i j c) -> o c i j", i=KERNEL, j=KERNEL)
        # The adjoint of a convolution is the transposed one with the same weight.
        given = _convolve(grad, weight, not ctx.transposed) if ctx.needs_input_grad[0] else None
        return given, own, None


def _convolve(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    convolve = F.conv_transpose2d if transposed else F.conv2d
    return convolve(x, weight, stride=STRIDE, padding=PADDING)


# It is an operator, so that a compiler does not trace it: compiled copies of windows are slower.
@torch.library.custom_op("latentplan::halving_weight_gradient", mutates_args=())
def weight_gradient(large: Tensor, small: Tensor) -> Tensor:
    """The gradient of the filters, (O, 4 * 4 * C).

    Args:
        large: (N, C, H, W), channels last. small: (N, O, H / 2, W / 2), channels last.
    """
    large, small = (x.permute(0, 2, 3, 1) for x in (large, small))
    (_, height, width, outputs), channels = small.shape, large.shape[-1]
    size = KERNEL**2 * channels
    maps = min(len(large), cached_rows(height * width * size, large.device, WINDOWS))
    padded = large.new_zeros(maps, *(STRIDE * x + 2 * PADDING for x in (height, width)), channels)
    inside = padded[:, PADDING:-PADDING, PADDING:-PADDING]
    each, row, column, _ = padded.stride()
    strides = each, STRIDE * row, STRIDE * column, row, column, 1
    windows = padded.as_strided((maps, height, width, KERNEL, KERNEL, channels), strides)
    copied = torch.empty(windows.shape, dtype=large.dtype)
    total = torch.zeros(outputs, size)
    for x, y in zip(large.split(maps), small.split(maps), strict=True):
        n = len(x)
        inside[:n] = x
        copied[:n] = windows[:n]
        pieces = math.gcd(PIECES, n * height * width)
        rows = y.reshape(pieces, -1, outputs).mT
        total += torch.bmm(rows, copied[:n].view(pieces, -1, size)).sum(0, dtype=torch.float32)
    return total.to(large.dtype)


@weight_gradient.register_fake
def _(large: Tensor, small: Tensor) -> Tensor:
    return large.new_empty(small.shape[1], KERNEL**2 * large.shape[1])
