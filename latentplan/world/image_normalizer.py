"""Images in the form that encoder and decoder use: cut into patches, and normalized per pixel."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from latentplan.nn.cache import cached_rows
from latentplan.nn.moments import update_moments

PATCH = {"strided": 1, "patch": 4}  # side of the patches, by ``world.coder``
FITTED = 100  # batches that the statistics are taken from
FLOOR = 0.3  # fraction of the typical spread that is added: a constant pixel may change later


class ImageNormalizer(nn.Module):
    """Normalizes images by the mean and spread of every pixel over the first batches.

    Images (..., height, width, 3) are also cut into patches (..., height / p, width / p, 3 p p).
    This is done once, as bytes, so that all later operations read memory in order.

    Most of a rendered scene is background. Without the statistics, encoder and decoder spend
    hundreds of updates on the background, and a thin moving part is lost in the encoder's input
    (measured in docs/lab_notes/pixels.md). The loss stays in the units of the image; only its
    parametrization changes.
    """

    batches: Tensor
    mean: Tensor
    variance: Tensor
    spread: Tensor

    def __init__(self, shape: tuple[int, ...], patch: int):
        super().__init__()
        self.patch = patch
        height, width, self.channels = shape
        size = height // patch, width // patch, self.channels * patch**2
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.full(size, 0.5))
        self.register_buffer("variance", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))

    @torch.no_grad()
    def fit(self, image: Tensor) -> None:
        """Update the statistics by images (..., height, width, 3) uint8, in the first batches."""
        if self.batches >= FITTED:
            return
        x = self.patchify(image).flatten(0, -4).float() / 255.0
        self.batches += 1
        rate = 1 / self.batches.float()
        update_moments(self.mean, self.variance, x, rate)
        pixels = self.variance.unflatten(-1, (-1, self.channels))
        spread = pixels.mean(-1, keepdim=True).sqrt()
        spread = spread + FLOOR * spread.square().mean().sqrt() + 1e-3
        self.spread.copy_(spread.expand_as(pixels).flatten(-2))

    def freeze(self) -> None:
        """Keep the statistics as they are from now on."""
        self.batches.fill_(FITTED)

    def patchify(self, image: Tensor) -> Tensor:
        """Cut images into patches: (..., height, width, 3) -> (..., h, w, C)."""
        p = self.patch
        return rearrange(image, "... (h i) (w j) c -> ... h w (i j c)", i=p, j=p).contiguous()

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`patchify`."""
        p = self.patch
        return rearrange(x, "... h w (i j c) -> ... (h i) (w j) c", i=p, j=p)

    def normalize(self, image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalize patches (..., h, w, C) uint8, and round once, to ``dtype``."""
        mean, factor = 255.0 * self.mean, 1 / (255.0 * self.spread)
        out = torch.empty(image.shape, dtype=dtype, device=image.device)
        rows = cached_rows(self.mean.numel(), image.device)
        flat = (x.view(-1, *self.mean.shape).split(rows) for x in (out, image))
        for to, x in zip(*flat, strict=True):
            to.copy_((x - mean).mul_(factor))
        return out

    def denormalize(self, x: Tensor) -> Tensor:
        """Normalized patches (..., h, w, C) -> images (..., height, width, 3).

        Values are in [0, 1] up to the error of the decoder; they are not clamped.
        """
        return self.unpatchify(self.mean + self.spread * x)

    def squared_error(self, x: Tensor, image: Tensor) -> Tensor:
        """Squared error of reconstructed images, summed over pixels and channels.

        Args:
            x: (N, h, w, C) normalized patches of the reconstruction.
            image: (N, h, w, C) uint8 patches of the image.

        Returns:
            (N,) float32, in units of the image.
        """
        return _SquaredError.apply(x, image, self.mean, self.spread)


class _SquaredError(torch.autograd.Function):
    """The squared error, which computes its gradient at once while both are in the cache.

    In passes over whole batches of images, the loss took longer than the decoder's forward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, image: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        grad, errors, twice = torch.empty_like(x), [], 2 * spread
        rows = cached_rows(mean.numel(), x.device)
        for to, *given in zip(*(y.split(rows) for y in (grad, x, image)), strict=True):
            error = torch.addcmul(mean, given[0].float(), spread).sub_(given[1], alpha=1 / 255)
            errors.append(error.square().sum((1, 2, 3)))
            to.copy_(error.mul_(twice))
        ctx.save_for_backward(grad)
        return torch.cat(errors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        out, rows = torch.empty_like(own), cached_rows(own[0].numel(), own.device)
        for to, x, factor in zip(*(y.split(rows) for y in (out, own, grad)), strict=True):
            torch.mul(x, factor.view(-1, 1, 1, 1), out=to)  # rounded once
        return out, None, None, None
