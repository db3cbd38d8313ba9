"""The size of pieces that stay in the cache.

With such pieces, a full update on a CPU takes 0.95 to 0.97 of the time.
"""

from __future__ import annotations

import sys

import torch

NUMBERS = 2**18  # float32: 1 MiB, which with its temporaries stays in a CPU core's cache


def cached_rows(row: int, device: torch.device, numbers: int = NUMBERS) -> int:
    """The number of rows to process at a time.

    On a CPU these are as many as stay in its cache from one operation to the next. On a GPU, and
    while a compiler traces the operations in order to fuse them, these are all rows.

    Args:
        row: numbers in a row.
        numbers: numbers that fit into the cache.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return sys.maxsize
    return max(1, numbers // row)
