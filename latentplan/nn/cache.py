"""How much to work on at a time: passes over memory cost more than what they compute."""

from __future__ import annotations

import sys

import torch

NUMBERS = 2**18  # float32: 1 MiB, which with its temporaries stays in a CPU core's cache


def cached_rows(row: int, device: torch.device, numbers: int = NUMBERS) -> int:
    """How many rows of ``row`` numbers each, ``numbers`` in all, to take at a time: on a CPU those
    that stay in its cache from one operation to the next. On a GPU, and for a compiler, which
    fuses: all."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return sys.maxsize
    return max(1, numbers // row)
