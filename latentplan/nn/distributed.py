"""Data-parallel learning: what the ranks of a process group tell each other in an update.

Every rank (a process that ``torchrun`` has started) has the same weights and rows of its own. Its
loss is a mean over its rows, so the mean of the ranks' gradients is the gradient of the joined
batch. Quantiles, variances and correlations do not average, and are computed from the joined rows.

The process group is the default one of ``torch.distributed``. Where there is none, every function
returns what it was given. All ranks must call the same functions in the same order, with tensors of
the same shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


@torch.no_grad()
def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace tensors (...) by their means over ranks, in place, with a single all-reduce.

    Args:
        tensors: of one floating-point type, on one device.
    """
    if world_size() == 1:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    distributed.all_reduce(flat)
    flat /= world_size()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over ranks of a tensor (...), without a gradient."""
    if world_size() == 1:
        return x
    mean = x.detach().float().clone()
    average_over_ranks([mean])
    return mean


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks: (N, ...) -> (ranks * N, ...).

    All ranks must compute the same loss from the result. The mean of the gradients that they get
    for their own weights is then the gradient of that loss.
    """
    return x if world_size() == 1 else _GatherRows.apply(x)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(world_size())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The other ranks get the same gradient, each for its own rows. The factor undoes the
        # division of the mean over ranks.
        begin = distributed.get_rank() * ctx.rows
        return world_size() * grad[begin : begin + ctx.rows]
