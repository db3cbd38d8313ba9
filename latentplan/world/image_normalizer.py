"""Pictures as the model works on them: cut into the patches that its coders read and write, and in
units in which what moves is large and what stands still is zero."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from latentplan.nn.cache import cached_rows

PATCH = {"strided": 1, "patch": 4}  # side of the patches, by ``world.coder``
FITTED = 100  # batches that the statistics are taken from
FLOOR = 0.3  # of the picture's typical spread: a pixel that never changed yet may change later


class ImageNormalizer(nn.Module):
    """Mean and spread of every pixel over the first batches, frozen after them; and how pictures
    (..., height, width, 3) are cut into patches (..., height / p, width / p, 3 p p).

    Most of a rendered scene is background. Without the statistics the coders spend hundreds of
    updates on painting it, and a thin moving part is lost in the encoder's input; measured in
    docs/lab_notes/pixels.md. The loss stays in picture units: only its parametrization changes.

    They are cut once, as bytes, so that whatever is then done to them runs along memory.
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
        """Take in a batch (..., height, width, 3) uint8, if it is one of the first."""
        if self.batches >= FITTED:
            return
        x = self.patchify(image).flatten(0, -4).float() / 255.0
        self.batches += 1
        share = 1 / self.batches.float()
        # Combined batch by batch (Chan et al.): E[x^2] - E[x]^2 would round away small variances.
        within, shift = x.var(0, correction=0), x.mean(0) - self.mean
        self.variance.lerp_(within + (1 - share) * shift.square(), share)
        self.mean.lerp_(x.mean(0), share)
        pixels = self.variance.unflatten(-1, (-1, self.channels))
        spread = pixels.mean(-1, keepdim=True).sqrt()
        spread = spread + FLOOR * spread.square().mean().sqrt() + 1e-3
        self.spread.copy_(spread.expand_as(pixels).flatten(-2))

    def freeze(self) -> None:
        """Take the statistics of no more batches."""
        self.batches.fill_(FITTED)

    def patchify(self, image: Tensor) -> Tensor:
        """(..., height, width, 3) -> (..., h, w, C), patches."""
        p = self.patch
        return rearrange(image, "... (h i) (w j) c -> ... h w (i j c)", i=p, j=p).contiguous()

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`patchify`."""
        p = self.patch
        return rearrange(x, "... h w (i j c) -> ... (h i) (w j) c", i=p, j=p)

    def normalize(self, image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., h, w, C) uint8, cut -> ``dtype``, rounded once, at the end."""
        mean, factor = 255.0 * self.mean, 1 / (255.0 * self.spread)
        out = torch.empty(image.shape, dtype=dtype, device=image.device)
        rows = cached_rows(self.mean.numel(), image.device)
        flat = (x.view(-1, *self.mean.shape).split(rows) for x in (out, image))
        for to, x in zip(*flat, strict=True):
            to.copy_((x - mean).mul_(factor))
        return out

    def restore(self, x: Tensor) -> Tensor:
        """Normalized patches (..., h, w, C) -> pictures (..., height, width, 3) in [0, 1], but not
        clamped."""
        return self.unpatchify(self.mean + self.spread * x)

    def squared_error(self, x: Tensor, image: Tensor) -> Tensor:
        """Of restored pictures, summed over their numbers.

        Args:
            x: (N, h, w, C), normalized. image: the same, uint8, cut.

        Returns:
            (N,) float32.
        """
        return _SquaredError.apply(x, image, self.mean, self.spread)


class _SquaredError(torch.autograd.Function):
    """The gradient is made along with the error, while both are in the cache: written out in passes
    over whole batches of pictures, the loss took longer than the decoder's convolutions forward."""

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
