"""``latentplan plot``: learning curves of runs, with published returns beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentplan.inspection.curves import CONFIDENCE, FEW, band, on_common_frames
from latentplan.inspection.plots import pyplot
from latentplan.runtime import disk
from latentplan.study.learning_curves import (
    METRICS,
    Curve,
    Groups,
    Run,
    group,
    read_runs,
    unknown_metric,
)
from latentplan.study.published import (
    NAMES,
    PUBLISHED_REPEAT,
    Published,
    published,
    why_not_comparable,
)
from latentplan.types import UserError

AXES = {  # labels of the vertical axis
    "train": "return of training episodes",
    "eval": "return of the mean action",
    "sample": "return of the sampled policy",
    "planner": "return of the planner",
}
COLUMNS = 3  # panels beside each other
PANEL = (4.6, 3.4)  # inches
MARKERS = dict(zip(NAMES.values(), "osD^vPX", strict=True))  # of the published methods
LETTERS_PER_INCH = 15.5  # of the caption
LINE = 0.16  # inches, of the caption and the legend
LEGEND_LINES = 4  # at most


def plot(
    folders: Sequence[Path], out: Path, *, metric: str = "eval", with_published: bool = False
) -> str:
    """Draw learning curves: a panel per task, and a color for the settings that runs share.

    Args:
        folders: run folders.
        out: the image file. Its suffix is a format that matplotlib writes.
        metric: a key of ``METRICS``, or the name of a metric in ``metrics.jsonl``.
        with_published: also draw published returns, where task and observations agree.

    Returns:
        The path and the caption of the image.

    Raises:
        UserError: a folder holds no run, no run has the metric, matplotlib is not installed, or the
            image cannot be written.
    """
    plt = pyplot()
    name = METRICS.get(metric, metric)
    runs = read_runs(folders)
    curves = {run.folder: run.curve(name) for run in runs}
    known = [run for run in runs if curves[run.folder].frames.size]
    if not known:
        raise unknown_metric(runs, name)
    groups = group(known)
    notes = _notes(groups)
    missing = [str(run.folder) for run in runs if run not in known]
    notes += [f"Without a value, and so left out: {', '.join(missing)}."] if missing else []
    beside = _published_of(groups, metric, notes) if with_published else {}
    caption = " ".join(notes)
    _require_format(plt, out)
    figure, axes = _panels(plt, len(groups), caption, legend=bool(beside))
    all_labels = list(dict.fromkeys(label for labels in groups.values() for label in labels))
    for axis, (task, labels) in zip(axes, groups.items(), strict=True):
        for label, members in labels.items():
            color = f"C{all_labels.index(label)}"
            _draw_group(axis, [curves[x.folder] for x in members], color, label)
        axis.legend(fontsize=8, framealpha=0.6, edgecolor="none")
        _draw_published(axis, beside.get(task, {}), _last_frame(labels, curves))
        axis.set(title=task, xlabel="thousand environment frames", ylabel=AXES.get(metric, name))
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    _add_legend_of_published(figure, axes, beside)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return f"{out}\n{caption}"


def _require_format(plt: Any, out: Path) -> None:
    """Raise a UserError if no image can be written at ``out``."""
    formats = plt.gcf().canvas.get_supported_filetypes()
    plt.close()
    if out.suffix.removeprefix(".").lower() not in formats:
        raise UserError(f"{out} must end in one of .{', .'.join(sorted(formats))}.")
    disk.require_writable(out)


def _panels(plt: Any, count: int, caption: str, *, legend: bool) -> tuple[Any, list[Any]]:
    """A figure with a caption, and its panels. There is room for a legend above them."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    width = max(6.0, PANEL[0] * columns)
    lines = textwrap.wrap(caption, int(width * LETTERS_PER_INCH))
    height = PANEL[1] * rows + LINE * (len(lines) + (LEGEND_LINES if legend else 0))
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
    )
    figure.supxlabel("\n".join(lines), fontsize=8, x=0.01, ha="left")
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _notes(groups: Groups) -> list[str]:
    """What the lines and bands are, in sentences."""
    counts = [len(runs) for labels in groups.values() for runs in labels.values()]
    if max(counts) == 1:
        return ["Every line is one run."]
    notes = [
        "Thin lines: single runs. Thick lines: their mean, interpolated between evaluations, over "
        "the frames that all of them cover."
    ]
    if any(1 < count < FEW for count in counts):
        notes.append(f"Bands of fewer than {FEW} runs: from the lowest to the highest run.")
    if max(counts) >= FEW:
        notes.append(
            f"Bands of {FEW} or more runs: {CONFIDENCE}\N{NO-BREAK SPACE}% bootstrap interval of "
            "the mean."
        )
    return notes


def _draw_group(axis: Any, curves: Sequence[Curve], color: str, label: str) -> None:
    single = len(curves) == 1
    for frames, values in curves:
        style = {"linewidth": 1.6} if single else {"linewidth": 0.8, "alpha": 0.45}
        marker = "o" if len(frames) == 1 else None  # a line of one point is invisible
        text = f"{label} (1 run)" if single else None
        axis.plot(frames / 1000, values, color=color, marker=marker, label=text, **style)
    if single:
        return
    frames, values = on_common_frames(curves)
    marker = "o" if len(frames) == 1 else None
    text = f"{label} ({len(curves)} runs)"
    axis.plot(frames / 1000, values.mean(0), color=color, linewidth=2, marker=marker, label=text)
    if len(frames):
        axis.fill_between(frames / 1000, *band(values), color=color, alpha=0.18, linewidth=0)


Beside = dict[str, dict[str, list[Published]]]  # by task, then by method


def _published_of(groups: Groups, metric: str, notes: list[str]) -> Beside:
    """The published returns to draw. Sentences about them are appended to ``notes``."""
    if metric not in METRICS:
        notes.append(f"No published returns are shown, because {metric} is not a return.")
        return {}
    beside: Beside = {}
    repeats: set[int] = set()
    for name, labels in groups.items():
        runs = [run for members in labels.values() for run in members]
        task = runs[0].task
        reason = why_not_comparable(task, [run.config.obs for run in runs])
        if reason is None:
            beside[name] = published(task)
            repeats |= {run.config.env.repeat for run in runs}
        else:
            notes.append(f"No published returns are shown for {name}: {reason}.")
    if beside:
        notes.append(
            "Gray: published means over seeds, from pixels at action repeat "
            f"{PUBLISHED_REPEAT}; filled markers: "
            "training episodes, open markers: evaluations."
        )
    if repeats - {PUBLISHED_REPEAT}:
        notes.append(f"The runs have action repeat {' and '.join(map(str, sorted(repeats)))}.")
    return beside


def _last_frame(labels: dict[str, list[Run]], curves: dict[Path, Curve]) -> int:
    return max(int(curves[run.folder].frames[-1]) for members in labels.values() for run in members)


def _draw_published(axis: Any, methods: dict[str, list[Published]], last: int) -> None:
    """Draw published returns up to the first ones at or after the frame ``last``."""
    for method, rows in methods.items():
        later = [row.frames for row in rows if row.frames >= last]
        shown = [row for row in rows if not later or row.frames <= later[0]]
        axis.plot(
            [row.frames / 1000 for row in shown],
            [row.mean for row in shown],
            color="0.45",
            linewidth=0.8,
            linestyle=":",
            marker=MARKERS[method],
            markersize=4.5,
            markerfacecolor="0.45" if shown[0].training else "white",
            label=method,
        )


def _add_legend_of_published(figure: Any, axes: Sequence[Any], beside: Beside) -> None:
    """Explain the markers of published returns, once for all panels."""
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    labels = {}
    for method in MARKERS:
        seeds = {row.seeds for methods in beside.values() for row in methods.get(method, ())}
        if seeds:
            count = "-".join(map(str, sorted({min(seeds), max(seeds)})))
            labels[f"{method}, published ({count} seeds)"] = lines[method]
    if labels:
        columns = 4 if len(axes) > 1 else 2
        figure.legend(
            labels.values(),
            labels,
            loc="outside upper center",
            ncols=columns,
            fontsize=8,
            frameon=False,
        )
