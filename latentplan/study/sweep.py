"""The points of a sweep: a grid, or a random search with a seed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

MOST = 10_000  # points of a sweep
DIGITS = 4  # of a number that is drawn


def expand(axes: Mapping[str, Any], samples: int, seed: int) -> dict[str, dict[str, str]]:
    """The points of a sweep by name: values by key.

    Args:
        axes: for each key a list of values, or a range ``{low, high}``, whose numbers are drawn
            uniformly, with ``log: true`` uniformly in their logarithm. A range whose bounds are
            both written as integers has integers only.
        samples: the number of points to draw, of which those drawn twice count once; 0: all points
            of the grid.
        seed: of the draws.

    Raises:
        ValueError: an axis is neither a list nor a range, a range is in a grid, there are too many
            points, or two points have the same name.
    """
    lists = [key for key, axis in axes.items() if isinstance(axis, list) and axis]
    rng = np.random.default_rng(seed)
    if len(lists) == len(axes):
        size = math.prod(len(axis) for axis in axes.values())
        if min(size, samples or size) > MOST:
            raise ValueError(f"it has {size} points, more than {MOST}")
        # A part of a grid is drawn without repeats.
        chosen = sorted(rng.choice(size, samples, replace=False)) if 0 < samples < size else None
        grid = itertools.product(*axes.values())
        kept = grid if chosen is None else _at(grid, chosen)
        points = [dict(zip(axes, values, strict=True)) for values in kept]
    elif samples < 1:
        raise ValueError("a range needs samples, the number of points to draw")
    elif samples > MOST:
        raise ValueError(f"it has {samples} points, more than {MOST}")
    else:
        drawn = ({key: _draw(key, axes[key], rng) for key in axes} for _ in range(samples))
        points = list({tuple(point.values()): point for point in drawn}.values())
    named = {_name(point): point for point in points}
    if len(named) < len(points):
        raise ValueError("two of its points have the same name")
    return named


def _at(grid: Any, chosen: list[int]) -> list[tuple[str, ...]]:
    wanted = set(chosen)
    return [values for index, values in enumerate(grid) if index in wanted]


def _draw(key: str, axis: Any, rng: np.random.Generator) -> str:
    """One value of an axis, as a text."""
    if isinstance(axis, list) and axis:
        return str(axis[rng.integers(len(axis))])
    try:
        low, high = float(axis["low"]), float(axis["high"])
        log = {"true": True, "false": False}[axis.get("log", "false")]
        valid = low < high and (low > 0 or not log) and set(axis) <= {"low", "high", "log"}
    except (KeyError, TypeError, ValueError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"{key} is neither a list of values nor low, high and log of a range")
    integers = all(re.fullmatch(r"-?\d+", axis[name]) for name in ("low", "high"))
    if integers:
        high += 1  # the upper bound can be drawn
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if log else rng.uniform(low, high)
    return str(math.floor(value)) if integers else f"{value:.{DIGITS}g}"


def _name(point: Mapping[str, Any]) -> str:
    """The keys (their last parts where these differ) and values of a point, for a folder's name."""
    short = [key.split(".")[-1] for key in point]
    keys = short if len(set(short)) == len(short) else list(point)
    text = ",".join(f"{key}={value}" for key, value in zip(keys, point.values(), strict=True))
    return re.sub(r"[^\w.=,+-]", "_", text, flags=re.ASCII)
