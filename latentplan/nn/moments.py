"""Running mean and variance."""

from __future__ import annotations

from torch import Tensor


def update_moments(mean: Tensor, variance: Tensor, x: Tensor, rate: Tensor) -> None:
    """Move a mean and a variance (...) towards those of a batch, in place.

    Batches are combined as in Chan et al., since E[x^2] - E[x]^2 would lose small variances.

    Args:
        x: (N, ...) the batch.
        rate: () the weight of the batch; 1 / n for the n-th batch gives the moments of all.
    """
    within, shift = x.var(0, correction=0), x.mean(0) - mean
    variance.lerp_(within + (1 - rate) * shift.square(), rate)
    mean.lerp_(x.mean(0), rate)
