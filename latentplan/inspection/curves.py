"""Evaluation curves of run folders, as rows of a table and as charts."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from latentplan.config.loading import load_resolved
from latentplan.inspection.plots import marker, pyplot
from latentplan.runs import metrics_file, run_folder
from latentplan.types import UserError

COLUMNS = (
    *("run", "task", "obs", "size", "ablation", "seed"),
    *("frame", "seconds", "mean", "std", "planner"),
)

WIDTH, PER_ROW = 13, 4  # inches of a figure, and largest number of panels beside each other
HEIGHTS = {1: 4.5, 2: 3.8, 3: 3.4, 4: 3.0}  # inches of a panel, by the number of columns
CONFIDENCE, RESAMPLES = 95, 1000  # percent of the bootstrap's resamples that lie in a band
FEW = 5  # with fewer runs, a bootstrap interval would be far too narrow
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
    title: str = "",
    goal: float | None = None,
    minutes: bool = False,
) -> None:
    """Plot returns against frames.

    There is a panel for each title and a color for each label. A thin line is one run. If a label
    has several runs, a thick line is their mean, with the band of :func:`band`.

    Args:
        panels: {title: {label: curves}}.
        path: the PNG to write.
        title: the title of the whole figure.
        goal: a return at which a dashed line is drawn.
        minutes: draw every panel a second time, against wall-clock time.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    x_keys = ("frame", "seconds") if minutes else ("frame",)
    views = [(title, key) for title in panels for key in x_keys]
    columns = min(len(views), PER_ROW)
    rows = -(-len(views) // columns)
    height = rows * HEIGHTS[columns] + 0.3 * bool(title)
    figure, grid = plt.subplots(
        rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained"
    )
    if title:
        figure.suptitle(title, fontsize=11)
    axes = grid.ravel()
    for axis in axes[len(views) :]:
        axis.set_axis_off()
    labels = list(dict.fromkeys(label for groups in panels.values() for label in groups))
    for axis, (panel, key) in zip(axes, views, strict=False):
        for label, curves in panels[panel].items():
            _draw_group(axis, curves, key, f"C{labels.index(label)}", label)
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel("thousand environment frames" if key == "frame" else "minutes")
        axis.grid(alpha=0.3)
        if axis.dataLim.ymin >= 0:
            axis.set_ylim(bottom=0)
        if goal is not None:
            axis.axhline(goal, color="gray", linestyle="--", linewidth=1)
        if axis is axes[0] or not panels[panel].keys() <= panels[views[0][0]].keys():
            axis.legend(frameon=False, fontsize=8)
    for axis in grid[:, 0]:
        axis.set_ylabel("evaluation return")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_group(axis: Any, curves: Sequence[Curve], key: str, color: str, label: str) -> None:
    """Draw the curves of one label, and their mean."""
    unit = 1000 if key == "frame" else 60
    single = len(curves) == 1
    for _, rows in curves:
        x, y = [row[key] / unit for row in rows], [row["mean"] for row in rows]
        opacity = 1 if single else 0.35
        axis.plot(x, y, color=color, linewidth=1, alpha=opacity, marker=marker(x), markersize=4)
    frames, scores = aligned(curves) if key == "frame" and not single else ([], np.empty((0, 0)))
    x = [frame / unit for frame in frames]
    mean = scores.mean(0) if len(scores) else []
    axis.plot(x, mean, color=color, label=label, marker=marker(x))
    if frames and len(scores) > 1:
        low, high = band(scores)
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def aligned(curves: Sequence[Curve]) -> tuple[list[int], np.ndarray]:
    """The scores of runs at common frames, as of :func:`on_common_frames`.

    Runs without an evaluation are left out.

    Returns:
        F frames, and the scores (runs, F).
    """
    known = [
        (np.array([x["frame"] for x in rows]), np.array([x["mean"] for x in rows]))
        for _, rows in curves
        if rows
    ]
    if not known:
        return [], np.empty((0, 0))
    frames, scores = on_common_frames(known)
    return frames.tolist(), scores


def on_common_frames(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate curves linearly at all their frames, inside the range that all curves cover.

    Args:
        curves: the frames and the values (T,) of each run.

    Returns:
        Frames (F,) and values (runs, F). F is 0 if the curves have no common range.
    """
    first = max(frames[0] for frames, _ in curves)
    last = min(frames[-1] for frames, _ in curves)
    union = np.unique(np.concatenate([frames for frames, _ in curves]))
    frames = union[(first <= union) & (union <= last)]
    return frames, np.stack([np.interp(frames, *curve) for curve in curves])


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper end (F,) of the band around the mean of several runs.

    With at least ``FEW`` runs it is the 95 % bootstrap interval of the mean, where the same runs
    are drawn for all frames. With fewer runs it is the range from the lowest to the highest run.

    Args:
        values: (runs, F).
    """
    count = len(values)
    if count < FEW:
        return values.min(0), values.max(0)
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    weights = np.stack([np.bincount(row, minlength=count) for row in drawn]) / count
    outside = (100 - CONFIDENCE) / 2
    low, high = np.percentile(weights @ values, [outside, 100 - outside], axis=0)
    return low, high


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float]]:
    """The frames of :func:`aligned`, and the mean over the runs at each of them."""
    frames, scores = aligned(curves)
    return frames, [float(x) for x in scores.mean(0)] if frames else []


def missing(curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> list[str]:
    """A sentence for every run and mean that a figure of :func:`draw_curves` does not have."""
    sentences = []
    for title, groups in curves.items():
        for label, group in groups.items():
            sentences += [
                f"{curve.description['run']} is not in the figure: it has not been evaluated yet."
                for curve in group
                if not curve.rows
            ]
            if sum(bool(curve.rows) for curve in group) > 1 and not aligned(group)[0]:
                sentences.append(
                    f"{title}, {label} has no mean: its runs were not evaluated at common frames."
                )
    return sentences


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 1)
