#!/usr/bin/env python3
"""Time a full update against batch, horizon, candidates and other keys, and draw the result.

    tools/benchmarks/growth.py CHART.png [KEY=VALUE ...] [--repeats N]

One key changes at a time. The other keys keep the values of ``size=cpu`` with the planner.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentplan.bench.updates import time_updates
from latentplan.inspection.plots import pyplot
from latentplan.types import UserError

# Values around size=cpu with the planner. The line of proportion passes through the middle value.
AXES: dict[str, tuple[int, ...]] = {
    "train.batch": (4, 8, 16, 32, 64),
    "behavior.horizon": (4, 8, 15, 30),
    "plan.candidates": (1, 2, 4, 8, 16),
    "plan.horizon": (1, 2, 4, 8),
    "world.members": (2, 5, 10),
    "world.deter": (64, 128, 256, 512),
}
SHAPE = (2, 3)  # rows and columns of panels in the chart


def growth(overrides: Sequence[str], repeats: int) -> dict[str, dict[int, float]]:
    """Median seconds of a full update, {key: {value: seconds}}; one key changes at a time.

    All settings are timed in turns. They are not compiled unless ``overrides`` say so, since each
    would take a minute.

    Raises:
        UserError: an override has a wrong key or value.
    """
    base = [*("size=cpu", "ablation=coplanner", "train.compile=off"), *overrides]
    changes = [f"{key}={value}" for key, values in AXES.items() for value in values]
    seconds = time_updates({item: [*base, item] for item in changes}, repeats)
    return {
        key: {value: seconds[f"{key}={value}"]["median"] for value in values}
        for key, values in AXES.items()
    }


def describe_growth(seconds_by_key: Mapping[str, Mapping[int, float]]) -> str:
    """One line of text per key: values, and milliseconds."""
    lines = ["full update, ms; one key changes at a time"]
    for key, seconds in seconds_by_key.items():
        times = ", ".join(f"{value}: {1000 * x:.0f}" for value, x in seconds.items())
        lines.append(f"  {key:18} {times}")
    return "\n".join(lines)


def draw_growth(seconds_by_key: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Draw a panel per key with logarithmic axes, and the line of proportion in each.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(*SHAPE, figsize=(10, 5.5), squeeze=False, layout="constrained")
    for axis, (key, seconds) in zip(axes.flat, seconds_by_key.items(), strict=True):
        x, y = list(seconds), [1000 * value for value in seconds.values()]
        middle = len(x) // 2
        axis.plot(x, [y[middle] * value / x[middle] for value in x], color="gray", linestyle=":")
        axis.plot(x, y, marker=".")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(x, [str(value) for value in x])
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms per update")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chart", type=Path, help="a .png file")
    parser.add_argument("items", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=7, help="default: 7")
    args = parser.parse_intermixed_args(argv)
    try:
        seconds = growth(args.items, args.repeats)
        print(describe_growth(seconds))
        draw_growth(seconds, args.chart)
    except UserError as error:
        print(f"growth: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
