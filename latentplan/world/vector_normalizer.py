"""Vectors in the form that encoder and decoder use: standardized per entry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentplan.nn.distributions import symlog
from latentplan.nn.moments import update_moments

RATE = 1e-3  # smallest rate, per batch, at which the statistics follow the data
FLOOR = 1e-3  # smallest spread, in symlog units: a constant entry may change later
LIMIT = 10.0  # largest standardized value: an entry may leave its former range far behind


class VectorNormalizer(nn.Module):
    """Standardizes vectors (..., dim) by the running mean and spread of every entry.

    Vectors are squashed by symlog first, which bounds the influence of outliers. Encoder and
    decoder see an entry of millimeters and an entry of meters alike. Without the statistics, the
    summed squared error does not pay for small entries, and the latent state leaves them out.

    The statistics are those of all batches at first, and follow the data slowly from then on. They
    never stop, because an entry can be constant in random play: a touch sensor, for example.
    """

    batches: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    @torch.no_grad()
    def fit(self, vector: Tensor) -> None:
        """Update the statistics by vectors (..., dim), unless they are frozen."""
        if self.batches < 0:
            return
        x = symlog(vector).flatten(0, -2)
        self.batches += 1
        rate = torch.clamp(1 / self.batches.float(), min=RATE)
        update_moments(self.mean, self.variance, x, rate)

    def freeze(self) -> None:
        """Keep the statistics as they are from now on."""
        self.batches.fill_(-1)

    @property
    def spread(self) -> Tensor:
        """(dim,) the standard deviation that entries are divided by, in symlog units."""
        return self.variance.sqrt().clamp(min=FLOOR)

    def normalize(self, vector: Tensor) -> Tensor:
        """Standardize vectors (..., dim)."""
        return ((symlog(vector) - self.mean) / self.spread).clamp(-LIMIT, LIMIT)

    def denormalize(self, x: Tensor) -> Tensor:
        """Standardized vectors (..., dim) in symlog units."""
        return self.mean + self.spread * x
