"""The results of a benchmark as text, and as files to compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentplan.bench.loop import describe_loop
from latentplan.bench.parts import FULL
from latentplan.bench.planning import describe_planning
from latentplan.bench.storage import describe_storage
from latentplan.types import UserError

BUSY = 0.5  # mean number of busy cores in the minute before


def describe(results: Sequence[Mapping[str, Any]]) -> str:
    """The results of :func:`latentplan.bench.measure.bench` as text."""
    return "\n\n".join(_describe(result) for result in results)


def _describe(result: Mapping[str, Any]) -> str:
    full = result["full"]
    lines = [
        f"{result['name']}: {result['widths']}",
        f"{result['precision']}, {result['device']}, {result['threads']} threads, "
        f"compiled: {result['compiled']}, torch "
        f"{result['torch']}; forward and backward, {result['repeats']} interleaved repetitions",
        f"{'':16}{'median ms':>10}{'min':>10}{'max':>10}{'share':>8}",
    ]
    if result["load_before"] > BUSY:
        lines.insert(
            0,
            f"The machine was busy before this began (load {result['load_before']:.1f}), so these "
            "timings are not reliable.",
        )
    for name, row in [*result["parts"].items(), (FULL, full)]:
        if name == FULL:
            total = result["sum_of_parts"]
            fraction = f"{'':20}{total / full['median']:8.0%}"
            lines.append(f"{'sum of parts':16}{1000 * total:10.1f}{fraction}")
        times = "".join(f"{1000 * row[key]:10.1f}" for key in ("median", "min", "max"))
        lines.append(f"{name:16}{times}{row['median'] / full['median']:8.0%}")
    env = result["environment"]
    lines.append(
        f"environment {env['task']} (renderer {env['renderer']}): "
        f"{env['frames_per_second']:.0f} frames/s with the policy, "
        f"{env['frames_per_second_without_policy']:.0f} without; per decision policy "
        f"{1000 * env['policy_seconds']:.1f} ms, simulator "
        f"{1000 * env['simulation_seconds']:.1f} ms"
    )
    for backend, rates in env["drawing"].items():
        each = ", ".join(f"{quality} {rate:.0f}" for quality, rate in rates.items())
        lines.append(f"drawing with {backend}, frames/s of 64 x 64: {each}")
    lines += describe_storage(result["storage"])
    lines.append(f"this process holds {result['rss_gib']:.2f} GiB")
    if "loop" in result:
        lines.append(describe_loop(result["loop"]))
    if "planning" in result:
        lines += describe_planning(result["planning"])
    return "\n".join(lines)


def compare(results: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> str:
    """The medians of ``results`` divided by those of an earlier file, where both have them."""
    before = {result["name"]: result for result in earlier}
    lines = []
    for now in results:
        then = before.get(now["name"])
        if then is None:
            continue
        lines.append(
            f"{now['name']}: now / earlier (the speed of the machine may have changed in between)"
        )
        for name, row in [*now["parts"].items(), (FULL, now["full"])]:
            old = then["full"] if name == FULL else then["parts"].get(name)
            if old is not None:
                lines.append(f"  {name:16}{row['median'] / old['median']:6.2f}")
    return "\n".join(lines) or "The earlier file has no result of the same name."


def read_json(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of :func:`write_json`.

    Raises:
        UserError: the file cannot be read, or it is not a result of `latentplan bench --json`.
    """
    try:
        results = json.loads(Path(path).read_text())
        assert all("parts" in result for result in results)
    except (OSError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{path} holds no results of `latentplan bench --json`.") from error
    return results


def write_json(path: str | Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the results of :func:`latentplan.bench.measure.bench`.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(list(results), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
