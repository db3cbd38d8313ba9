"""Compare the time of an update's parts with that of their products at the machine's peak rate.

Only matrix products and convolutions are counted, forward and backward. Norms, samples, logarithms
and memory make up the rest of the time.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

import latentplan.nn.convolution  # noqa: F401 - registers its operator
from latentplan.bench.parts import Part, waiting_for

SIDE = 2048  # rows and columns of the matrices whose product gives the peak rate
TRIALS = 5


@register_flop_formula(torch.ops.latentplan.halving_weight_gradient)
def _(large: torch.Size, small: torch.Size, *, out_shape: torch.Size, **_kwargs: Any) -> int:
    """The operations of the convolution: every number of the small map times every weight."""
    return 2 * small.numel() // small[1] * out_shape.numel()


class FlopCount(TorchDispatchMode):
    """Floating-point operations of products and convolutions inside the context, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            first = out if isinstance(out, torch.Tensor) else next(x for x in out if x is not None)
            self.flops[str(first.dtype).removeprefix("torch.")] += count(
                *args, **kwargs, out_val=out
            )
        return out


def peak_rates(device: torch.device) -> dict[str, float]:
    """Operations per second of large square products, by dtype: the best of a few trials."""
    wait = waiting_for(device)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(TRIALS + 1):
            wait()
            begin = time.perf_counter()
            a @ b
            wait()
            seconds.append(time.perf_counter() - begin)
        rates[str(dtype).removeprefix("torch.")] = 2 * SIDE**3 / min(seconds[1:])
    return rates


def floors(
    parts: Mapping[str, Part], seconds: Mapping[str, list[float]], rates: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """The operations of every part with products, their time at the peak rate, and the ratio.

    Args:
        seconds: seconds of repetitions, from :func:`latentplan.bench.parts.time_parts`.
        rates: from :func:`peak_rates`.
    """
    result = {}
    for name, part in parts.items():
        part.prepare()
        with FlopCount() as count:
            part.run()
        if not count.flops:
            continue
        floor = sum(flops / rates[dtype] for dtype, flops in count.flops.items())
        result[name] = {
            "gflop": sum(count.flops.values()) / 1e9,
            "floor": floor,
            "times_floor": statistics.median(seconds[name]) / floor,
        }
    return result
