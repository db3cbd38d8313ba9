#!/usr/bin/env python3
"""Gather evaluation curves of run folders into one CSV, one JSON and one picture.

    tools/results.py RUN [RUN ...] --out docs/results/NAME [--goal 700]

NAME.csv has a row per evaluation (run, task, obs, size, seed, frame, seconds, mean, std), NAME.json
what the runs were (command, commit, packages, machine, configuration keys), NAME.png returns
against frames and wall clock. Every run named is in all three: none is left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from latentplan.config import load_resolved
from latentplan.types import UserError

COLUMNS = ("run", "task", "obs", "size", "seed", "frame", "seconds", "mean", "std")


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The evaluations of a run, and what the run was."""
    config = load_resolved(folder / "config.yaml")
    what = {
        "run": folder.name,
        "task": config.task,
        "obs": config.obs,
        "size": config.size,
        "seed": config.seed,
    }
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if metrics.get("episode/eval_score") is not None:
            measured = {
                "frame": metrics["step"],
                "seconds": round(metrics["time"]),
                "mean": round(metrics["episode/eval_score"], 1),
                "std": round(metrics["episode/eval_std"], 1),
            }
            rows.append(what | measured)
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    return rows, what | {"repeat": config.env.repeat, "sessions": sessions}


def draw(runs: list[list[dict[str, Any]]], goal: float | None, path: Path) -> None:
    """Returns against frames (left) and minutes of wall clock (right), one color per task."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    tasks = sorted({run[0]["task"] for run in runs})
    colors = {task: f"C{i}" for i, task in enumerate(tasks)}
    seen: set[str] = set()
    for run in runs:
        task = run[0]["task"]
        label = None if task in seen else task.removeprefix("dmc:")
        seen.add(task)
        means = [row["mean"] for row in run]
        frames = [row["frame"] / 1000 for row in run]
        minutes = [row["seconds"] / 60 for row in run]
        axes[0].plot(frames, means, color=colors[task], marker=".", label=label)
        axes[1].plot(minutes, means, color=colors[task], marker=".")
    for axis, label in zip(axes, ("thousand environment frames", "minutes"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        if goal is not None:
            axis.axhline(goal, color="gray", linestyle="--", linewidth=1)
    axes[0].set_ylabel("evaluation return")
    axes[0].set_ylim(0, 1000)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="docs/results/NAME")
    parser.add_argument("--goal", type=float, help="a dashed line at this return")
    args = parser.parse_args()
    try:
        read_runs = [read(folder) for folder in args.runs]
    except (OSError, UserError) as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for rows, _ in read_runs:
            writer.writerows(rows)
    described = [what for _, what in read_runs]
    args.out.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")
    draw([rows for rows, _ in read_runs if rows], args.goal, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
