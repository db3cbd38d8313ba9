"""Evaluation curves of run folders, as rows of a table and as charts."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from latentplan.config.loading import load_resolved
from latentplan.inspection.plots import pyplot
from latentplan.runs import metrics_file, run_folder
from latentplan.types import UserError

COLUMNS = (
    *("run", "task", "obs", "size", "ablation", "seed"),
    *("frame", "seconds", "mean", "std", "planner"),
)

EVALUATION = ("time", "episode/eval_score", "episode/eval_std")  # what every evaluation logs


class Curve(NamedTuple):
    """The evaluations of one run, and a description of the run."""

    description: dict[str, Any]  # run (name), task, obs, size, ablation, seed, repeat, sessions
    rows: list[dict[str, Any]]  # frame, seconds, mean, std, planner (mean; None without one)


def read_curve(folder: Path) -> Curve:
    """Read the evaluation curve of a run folder.

    Raises:
        UserError: the folder contains no run, or one of its files is damaged.
    """
    config = load_resolved(folder / "config.yaml")
    settings = {key: getattr(config, key) for key in ("task", "obs", "size", "ablation", "seed")}
    rows = [
        {
            "frame": metrics["step"],
            "seconds": round(metrics["time"]),
            "mean": round(metrics["episode/eval_score"], 1),
            "std": round(metrics["episode/eval_std"], 1),
            "planner": _rounded(metrics.get("episode/planner_score")),
        }
        for metrics in read_metrics(folder)
        # Without one of these numbers, the row is no evaluation, or its values were not finite.
        if all(metrics.get(name) is not None for name in EVALUATION)
    ]
    repeat, sessions = config.env.repeat, run_folder.sessions(folder)
    description = {"run": folder.name, **settings, "repeat": repeat, "sessions": sessions}
    return Curve(description, rows)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``. Damaged lines are left out, with a warning.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return metrics_file.read(folder / "metrics.jsonl").rows
    except OSError as error:
        raise UserError(f"{folder} has no metrics.jsonl: {error.strerror}.") from error


def report_path(out: Path, ending: str) -> Path:
    """The path of a file of a report: ``out`` with ``ending`` appended to its name.

    The name may have dots, as in ``lr0.1``, so no suffix is replaced.
    """
    return out.with_name(out.name + ending)


def write_curves(curves: Sequence[Curve], out: Path) -> None:
    """Write ``out``.csv with a row per evaluation, and ``out``.json with a description per run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with report_path(out, ".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for description, rows in curves:
            writer.writerows({**description, **row} for row in rows)
    descriptions = [curve.description for curve in curves]
    report_path(out, ".json").write_text(json.dumps(descriptions, indent=1) + "\n")


def read_curves(out: Path) -> dict[str, Curve]:
    """Read the files of :func:`write_curves`: the curves by the name of the run.

    Raises:
        UserError: a file is missing, or is not a file of :func:`write_curves`.
    """
    try:
        descriptions = json.loads(report_path(out, ".json").read_text())
        curves = {description["run"]: Curve(description, []) for description in descriptions}
        with report_path(out, ".csv").open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = {key: float(row[key]) if row[key] else None for key in COLUMNS[-3:]}
                frame, seconds = int(row["frame"]), int(row["seconds"])
                curves[row["run"]].rows.append({"frame": frame, "seconds": seconds, **numbers})
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out}.csv and {out}.json are not the curves of a report: {error!r}."
        ) from error
    return curves


def draw_curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    path: Path | BinaryIO,
    *,
    goal: float | None = None,
    minutes: bool = False,
) -> None:
    """Plot returns against frames.

    There is a panel for each title and a color for each label. A thin line is one run. If a label
    has several runs, a thick line is their mean at the frames that all of them have.

    Args:
        panels: {title: {label: curves}}.
        path: the PNG to write.
        goal: a return at which a dashed line is drawn.
        minutes: draw every panel a second time, against wall-clock time.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    x_keys = ("frame", "seconds") if minutes else ("frame",)
    views = [(title, key) for title in panels for key in x_keys]
    width = min(4.5, 13 / len(views))
    figure, axes = plt.subplots(
        1, len(views), figsize=(width * len(views), 3.2), squeeze=False, layout="constrained"
    )
    labels = list(dict.fromkeys(label for groups in panels.values() for label in groups))
    for axis, (title, key) in zip(axes[0], views, strict=True):
        for label, curves in panels[title].items():
            _draw_group(axis, curves, key, f"C{labels.index(label)}", label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("thousand environment frames" if key == "frame" else "minutes")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        if goal is not None:
            axis.axhline(goal, color="gray", linestyle="--", linewidth=1)
        if axis is axes[0, 0] or not panels[title].keys() <= panels[views[0][0]].keys():
            axis.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("evaluation return")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_group(axis: Any, curves: Sequence[Curve], key: str, color: str, label: str) -> None:
    """Draw the curves of one label, and their mean."""
    unit = 1000 if key == "frame" else 60
    single = len(curves) == 1
    for _, rows in curves:
        x, y = [row[key] / unit for row in rows], [row["mean"] for row in rows]
        axis.plot(x, y, color=color, linewidth=1, alpha=1 if single else 0.35)
    x, y = mean_curve(curves) if key == "frame" and not single else ([], [])
    axis.plot([frame / unit for frame in x], y, color=color, label=label)


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float]]:
    """The frames at which every run was evaluated, and the mean over the runs at each of them."""
    scores = [{row["frame"]: row["mean"] for row in rows} for _, rows in curves]
    frames = sorted(set.intersection(*(set(x) for x in scores)))
    return frames, [float(np.mean([x[frame] for x in scores])) for frame in frames]


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 1)
