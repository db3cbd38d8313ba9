"""Random numbers of rows, of which each may have a generator of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None  # of all rows, or one per row


def draw_rows(
    sample: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device,
    axis: int = 0,
) -> Tensor:
    """Random numbers of N rows.

    With a generator per row, the numbers of a row do not depend on the other rows.

    Args:
        sample: ``torch.rand`` or ``torch.randn``.
        shape: of the result; its entry at ``axis`` is N.
        generator: one for all rows, N of them, or None for the global one.
        device: that of the generators and of the result.
        axis: the axis of the rows.
    """
    if not isinstance(generator, Sequence):
        return sample(*shape, generator=generator, device=device)
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    return torch.cat([sample(*one, generator=g, device=device) for g in generator], axis)
