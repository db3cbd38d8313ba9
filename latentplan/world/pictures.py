"""Pictures in units in which what moves is large and what stands still is zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FITTED = 100  # batches that the statistics are taken from
FLOOR = 0.3  # of the picture's typical spread: a pixel that never changed yet may change later


class PictureScale(nn.Module):
    """Mean and spread of every pixel over the first batches, frozen after them.

    Most of a rendered scene is background. Without this the coders spend hundreds of updates on
    painting it, and a thin moving part is lost in the encoder's input; measured in
    docs/results.md. The loss stays in picture units: only its parametrization changes.
    """

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.full(shape, 0.5))
        self.register_buffer("variance", torch.zeros(shape))
        self.register_buffer("spread", torch.ones(*shape[:2], 1))

    @torch.no_grad()
    def fit(self, image: Tensor) -> None:
        """Take in a batch (..., height, width, 3) uint8, if it is one of the first."""
        if self.batches >= FITTED:
            return
        x = image.flatten(0, -4).float() / 255.0
        self.batches += 1
        share = 1 / self.batches.float()
        # Combined batch by batch (Chan et al.): E[x^2] - E[x]^2 would round away small variances.
        within, shift = x.var(0, correction=0), x.mean(0) - self.mean
        self.variance.lerp_(within + (1 - share) * shift.square(), share)
        self.mean.lerp_(x.mean(0), share)
        spread = self.variance.mean(-1, keepdim=True).sqrt()
        self.spread.copy_(spread + FLOOR * spread.square().mean().sqrt() + 1e-3)

    def normalize(self, image: Tensor) -> Tensor:
        """(..., height, width, 3) uint8 -> float32."""
        return (image / 255.0 - self.mean) / self.spread

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`, with pictures in [0, 1] (not clamped)."""
        return self.mean + self.spread * x
