"""Running mean and variance."""

from __future__ import annotations

from torch import Tensor

from latentplan.nn.distributed import mean_over_ranks, world_size


def update_moments(mean: Tensor, variance: Tensor, x: Tensor, rate: Tensor) -> None:
    """Move a mean and a variance (...) towards those of a batch, in place.

    Batches are combined as in Chan et al., since E[x^2] - E[x]^2 would lose small variances.

    Args:
        x: (N, ...) the batch.
        rate: () the weight of the batch; 1 / n for the n-th batch gives the moments of all.
    """
    center, within = _batch_moments(x)
    shift = center - mean
    variance.lerp_(within + (1 - rate) * shift.square(), rate)
    mean.lerp_(center, rate)


def _batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (...) of a batch (N, ...), over the rows of all ranks."""
    mean, variance = x.mean(0), x.var(0, correction=0)
    if world_size() == 1:
        return mean, variance
    joined = mean_over_ranks(mean)
    return joined, mean_over_ranks(variance + (mean - joined).square())
