"""What ablations cost: their full updates, in turns, against the first of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latentplan.bench.updates import time_updates


def ablation_cost(
    ablations: Sequence[str], overrides: Sequence[str], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of a full update of every ablation, and its ratio to the first one's.

    Raises:
        UserError: an unknown ablation, a wrong key or value, no working renderer.
    """
    settings = {name: [*overrides, f"ablation={name}"] for name in ablations}
    seconds = time_updates(settings, repeats)
    base = seconds[ablations[0]]["median"]
    return {name: {**row, "ratio": row["median"] / base} for name, row in seconds.items()}


def describe_ablations(cost: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each."""
    first = next(iter(cost))
    lines = [f"full update, ms: median (min - max), times {first}"]
    for name, row in cost.items():
        low, middle, high = (1000 * row[key] for key in ("min", "median", "max"))
        lines.append(f"  {name:22} {middle:8.1f} ({low:.1f} - {high:.1f})  x {row['ratio']:.2f}")
    return "\n".join(lines)
