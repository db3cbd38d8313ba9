"""How the time of an update grows with what it is made of: batch, horizon, candidates, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from latentplan.bench.updates import time_updates
from latentplan.inspection.plots import pyplot

# Around size=cpu with the planner on; the value in the middle is what the others are held against.
AXES: dict[str, tuple[int, ...]] = {
    "train.batch": (4, 8, 16, 32, 64),
    "behavior.horizon": (4, 8, 15, 30),
    "plan.candidates": (1, 2, 4, 8, 16),
    "plan.horizon": (1, 2, 4, 8),
    "world.members": (2, 5, 10),
    "world.deter": (64, 128, 256, 512),
}
SHAPE = (2, 3)  # of the picture, in panels


def growth(overrides: Sequence[str], repeats: int) -> dict[str, dict[int, float]]:
    """Median seconds of a full update, {key: {value: seconds}}; one key moves at a time.

    All settings are timed in turns, and not compiled unless ``overrides`` say so: each would take
    a minute.

    Raises:
        UserError: a wrong key or value among ``overrides``.
    """
    base = [*("size=cpu", "ablation=coplanner", "train.compile=off"), *overrides]
    moved = [f"{key}={value}" for key, values in AXES.items() for value in values]
    seconds = time_updates({item: [*base, item] for item in moved}, repeats)
    return {
        key: {value: seconds[f"{key}={value}"]["median"] for value in values}
        for key, values in AXES.items()
    }


def describe_growth(found: Mapping[str, Mapping[int, float]]) -> str:
    """A line per key: value, milliseconds."""
    lines = ["full update, ms; one key moves at a time"]
    for key, seconds in found.items():
        times = ", ".join(f"{value}: {1000 * x:.0f}" for value, x in seconds.items())
        lines.append(f"  {key:18} {times}")
    return "\n".join(lines)


def draw_growth(found: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """A panel per key, both axes logarithmic, with the line of proportion through the middle.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(*SHAPE, figsize=(10, 5.5), squeeze=False, layout="constrained")
    for axis, (key, seconds) in zip(axes.flat, found.items(), strict=True):
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
