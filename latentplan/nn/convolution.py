"""Convolutions that halve or double a map; what a CPU is slow at is done as a matrix product."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

KERNEL, STRIDE, PADDING = 4, 2, 1


class HalvingConv(nn.Conv2d):
    """4 x 4, stride 2: (N, inputs, H, W) -> (N, outputs, H / 2, W / 2)."""

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

    def forward(self, x: Tensor) -> Tensor:
        if not _by_product(x, x.shape[-2:].numel(), self.out_channels):
            return super().forward(x)
        return _Convolution.apply(x, self.weight.to(x.dtype), True)


def _by_product(x: Tensor, positions: int, channels: int) -> bool:
    """Whether the weight's gradient is quicker as a product: on a CPU in bfloat16, where the
    smaller map has no more positions than the larger one has channels. (Of both ways' times the
    ratio is 0.4 to 0.7 there, and 1 with half as many channels.)"""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and positions <= channels


class _Convolution(torch.autograd.Function):
    """The same convolution, with another way to the gradient of the weight.

    In bfloat16, of 1024 maps of 4 x 4, oneDNN takes 52 ms (transposed 61) for the gradient of
    128 x 64 filters; windows copied out and one product take 22.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        return _convolve(x, weight, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        own = weight_gradient(*(grad, x) if ctx.transposed else (x, grad))
        own = rearrange(own, "o (i j c) -> o c i j", i=KERNEL, j=KERNEL)
        # The adjoint of a convolution is the transposed one with the same weight.
        given = _convolve(grad, weight, not ctx.transposed) if ctx.needs_input_grad[0] else None
        return given, own, None


def _convolve(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    convolve = F.conv_transpose2d if transposed else F.conv2d
    return convolve(x, weight, stride=STRIDE, padding=PADDING)


# An operator of its own, which a compiler leaves alone: code made for copying windows is slower.
@torch.library.custom_op("latentplan::halving_weight_gradient", mutates_args=())
def weight_gradient(large: Tensor, small: Tensor) -> Tensor:
    """(N, C, H, W) and (N, O, H / 2, W / 2), channels last -> (O, 4 * 4 * C)."""
    x = F.pad(large.permute(0, 2, 3, 1), (0, 0, *[PADDING] * 4))
    n, height, width, channels = x.shape
    shape = (n, height // STRIDE - 1, width // STRIDE - 1, KERNEL, KERNEL, channels)
    each, row, column, _ = x.stride()
    windows = x.as_strided(shape, (each, STRIDE * row, STRIDE * column, row, column, 1))
    windows = rearrange(windows, "n h w i j c -> (n h w) (i j c)")
    return rearrange(small, "n o h w -> (n h w) o").T @ windows


@weight_gradient.register_fake
def _(large: Tensor, small: Tensor) -> Tensor:
    return large.new_empty(small.shape[1], KERNEL**2 * large.shape[1])
