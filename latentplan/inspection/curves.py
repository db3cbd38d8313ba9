"""Evaluation curves of run folders, as rows of a table and as a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from latentplan.config.loading import load_resolved
from latentplan.inspection.plots import pyplot
from latentplan.runs import run_folder
from latentplan.types import UserError

COLUMNS = (
    *("run", "task", "obs", "size", "ablation", "seed"),
    *("frame", "seconds", "mean", "std", "planner"),
)


class Curve(NamedTuple):
    """The evaluations of one run, and what the run was."""

    what: dict[str, Any]
    rows: list[dict[str, Any]]  # frame, seconds, mean, std, planner (mean; None without one)


def read_curve(folder: Path) -> Curve:
    """Raises `UserError` when the folder holds no run, or a file of it is damaged."""
    config = load_resolved(folder / "config.yaml")
    what = {key: getattr(config, key) for key in ("task", "obs", "size", "ablation", "seed")}
    what = {"run": folder.name, **what}
    evaluated = [x for x in read_metrics(folder) if x.get("episode/eval_score") is not None]
    try:
        rows = [
            {
                "frame": metrics["step"],
                "seconds": round(metrics["time"]),
                "mean": round(metrics["episode/eval_score"], 1),
                "std": round(metrics["episode/eval_std"], 1),
                "planner": _rounded(metrics.get("episode/planner_score")),
            }
            for metrics in evaluated
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"An evaluation in {folder / 'metrics.jsonl'} is damaged.") from error
    repeat, sessions = config.env.repeat, run_folder.sessions(folder)
    return Curve({**what, "repeat": repeat, "sessions": sessions}, rows)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; one that is being written is left out.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]
    except OSError as error:
        raise UserError(f"{folder} has no metrics.jsonl: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    if not all("step" in row for row in rows):
        raise UserError(f"{path} is damaged: a line has no step.")
    return rows


def file_of(out: Path, ending: str) -> Path:
    """A file of a report: its name may have dots (``lr0.1``), so no suffix is replaced."""
    return out.with_name(out.name + ending)


def write_curves(curves: Sequence[Curve], out: Path) -> None:
    """``out``.csv with a row per evaluation, ``out``.json with what the runs were."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_of(out, ".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for what, rows in curves:
            writer.writerows({**what, **row} for row in rows)
    file_of(out, ".json").write_text(json.dumps([x.what for x in curves], indent=1) + "\n")


def read_curves(out: Path) -> dict[str, Curve]:
    """What :func:`write_curves` wrote, by the name of the run.

    Raises:
        UserError: a file is missing, or is something else.
    """
    try:
        described = json.loads(file_of(out, ".json").read_text())
        curves = {what["run"]: Curve(what, []) for what in described}
        with file_of(out, ".csv").open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = {key: float(row[key]) if row[key] else None for key in COLUMNS[-3:]}
                frame, seconds = int(row["frame"]), int(row["seconds"])
                curves[row["run"]].rows.append({"frame": frame, "seconds": seconds, **numbers})
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}.csv and .json are not a report's curves: {error!r}.") from error
    return curves


def draw_curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    path: Path | BinaryIO,
    *,
    goal: float | None = None,
    minutes: bool = False,
) -> None:
    """Returns against frames: a panel per title, a color per label, a thin line per run, and a
    thick one for their mean where there are several of the same frames.

    Args:
        goal: a dashed line at this return. minutes: every panel twice, also against wall clock.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    axes_of = ("frame", "seconds") if minutes else ("frame",)
    views = [(title, key) for title in panels for key in axes_of]
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
    unit = 1000 if key == "frame" else 60
    alone = len(curves) == 1
    for _, rows in curves:
        x, y = [row[key] / unit for row in rows], [row["mean"] for row in rows]
        axis.plot(x, y, color=color, linewidth=1, alpha=1 if alone else 0.35)
    x, y = mean_curve(curves) if key == "frame" and not alone else ([], [])
    axis.plot([frame / unit for frame in x], y, color=color, label=label)


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float]]:
    """Frames at which every run was evaluated, and the mean over runs there."""
    scores = [{row["frame"]: row["mean"] for row in rows} for _, rows in curves]
    frames = sorted(set.intersection(*(set(x) for x in scores)))
    return frames, [float(np.mean([x[frame] for x in scores])) for frame in frames]


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 1)
