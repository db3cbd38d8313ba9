"""``latentplan report``: one HTML file with the scores, curves and films of runs."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentplan.config.loading import load_resolved
from latentplan.inspection.curves import (
    CONFIDENCE,
    FEW,
    Curve,
    draw_curves,
    missing,
    read_curve,
    read_metrics,
)
from latentplan.inspection.imagination_report import imagine
from latentplan.inspection.plots import marker, pyplot
from latentplan.inspection.tensorboard_layout import FIRST_PAGE
from latentplan.inspection.visualizations import CAPTIONS
from latentplan.runs import resuming
from latentplan.study.html_page import Figure, Part, page
from latentplan.study.report import title_of
from latentplan.study.tables import Table
from latentplan.types import UserError

DESCRIBED = (
    *("latentplan", "python", "machine", "precision", "packages"),
    *("renderer", "render_backend", "render_quality"),
)


def write_report(
    runs: Sequence[Path], out: Path, *, device: str = "auto", module: str = "", trust: bool = False
) -> Path:
    """Write an HTML file: scores and curves of all runs, then films and settings of each run.

    Films and calibration are computed from the checkpoint of each run, into ``RUN/imagine``.

    Args:
        runs: run folders.
        out: path of the HTML file.
        device: where the models run.
        module, trust: as in :func:`latentplan.inspection.imagination_report.imagine`.

    Returns:
        ``out``.

    Raises:
        UserError: a folder holds no run, no run has been evaluated, or matplotlib is missing.
    """
    curves = {run: read_curve(run) for run in runs}
    if not any(curve.rows for curve in curves.values()):
        raise UserError("None of these runs has been evaluated yet.")
    # An error about the folder comes before the films are made.
    out.parent.mkdir(parents=True, exist_ok=True)
    panels = _panels(curves)
    title = title_of("latentplan", list(panels))
    caption = (
        "Evaluation return of the policy's mean action. A thin line is one run, a thick one the "
        f"mean of runs that differ only in the seed, and a band its {CONFIDENCE} % interval by a "
        f"bootstrap over the runs, or all of them where there are fewer than {FEW}."
    )
    suffix, content = _returns(panels, title)
    parts: list[Part] = [
        ("table", _summary(curves)),
        ("figure", Figure(suffix, content, caption, wide=True)),
        *(("p", sentence) for sentence in missing(panels)),
    ]
    for run, curve in curves.items():
        files = imagine(run, device=device, module=module, trust=trust)
        parts += _run_section(run, curve, files)
    out.write_text(page(title, parts), encoding="utf-8")
    return out


def _summary(curves: dict[Path, Curve]) -> Table:
    described = ("run", "task", "obs", "size", "ablation", "seed")
    head = (*described, "frames", "minutes", "return", "planner")
    rows: list[list[Any]] = []
    for description, points in curves.values():
        last = points[-1] if points else {}
        minutes = last["seconds"] // 60 if last else None
        rows.append(
            [
                *(description[k] for k in described),
                *(last.get("frame"), minutes, last.get("mean"), last.get("planner")),
            ]
        )
    return Table(head, rows)


def _run_section(run: Path, curve: Curve, imagined: dict[str, Any]) -> list[Part]:
    """The parts about one run. ``imagined`` is what `imagine` returned for it."""
    films = [
        Figure(Path(path).suffix, Path(path).read_bytes(), f"{name}: {CAPTIONS[name]}")
        for name, path in imagined["files"].items()
    ]
    suffix, charts = _charts(read_metrics(run))
    caption = "The curves to check first, against frames."
    return [
        ("h2", run.name),
        *_commands(run, curve.description["sessions"]),
        ("h3", "Curves"),
        ("figure", Figure(suffix, charts, caption, wide=True)),
        ("h3", "Imagination"),
        *(("p", imagined[key]) for key in ("note", "planner") if key in imagined),
        *(("figure", film) for film in films),
        ("details", ("Configuration", (run / "config.yaml").read_text(encoding="utf-8"))),
    ]


def _commands(run: Path, sessions: Sequence[dict[str, Any]]) -> list[Part]:
    """The commands and machines of a run, and the commands that repeat its results."""
    # Runs of earlier versions lack some of these keys, and a damaged record may lack them all.
    ran = "\n".join(
        f"{_typed(x.get('command', []))}    # commit {x.get('commit')}" for x in sessions
    )
    first = {key: x[key] for x in sessions[:1] for key in DESCRIBED if key in x}
    again = f"latentplan eval {run} --episodes 10\nlatentplan imagine {run}"
    machine = ("Machine and versions", json.dumps(first, indent=1))
    return [("pre", f"{ran}\n\n{again}"), ("details", machine)]


def _typed(command: Sequence[str]) -> str:
    """The command as a user types it."""
    return shlex.join(["latentplan", *command[1:]])


def _panels(curves: dict[Path, Curve]) -> dict[str, dict[str, list[Curve]]]:
    """The curves by task and label."""
    panels: dict[str, dict[str, list[Curve]]] = {}
    labels = _labels(list(curves))
    for run, curve in curves.items():
        panels.setdefault(curve.description["task"], {}).setdefault(labels[run], []).append(curve)
    return panels


def _returns(panels: dict[str, dict[str, list[Curve]]], title: str) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    draw_curves(panels, buffer, title=title)
    return ".png", buffer.getvalue()


def _labels(runs: Sequence[Path]) -> dict[Path, str]:
    """A label per run: its ablation, and the settings in which it differs from runs of its task.

    Runs with the same label share a mean curve, so they differ only in the seed.
    """
    settings = {run: resuming.identity(load_resolved(run / "config.yaml")) for run in runs}
    labels = {run: values["ablation"] for run, values in settings.items()}
    first = ("obs", "size")  # these determine other settings
    rest = [key for key in settings[runs[0]] if key not in (*first, "seed")]
    for key in (*first, *rest):
        groups: dict[tuple[str, str], list[Path]] = {}
        for run in runs:
            groups.setdefault((settings[run]["task"], labels[run]), []).append(run)
        for group in groups.values():
            if len({str(settings[run][key]) for run in group}) > 1:
                for run in group:
                    labels[run] += f" {key}={settings[run][key]}"
    return labels


def _charts(metrics: Sequence[dict[str, Any]]) -> tuple[str, bytes]:
    """The ten curves on the first page of TensorBoard."""
    plt = pyplot()
    charts = [item for group in FIRST_PAGE.values() for item in group.items()]
    figure, axes = plt.subplots(2, 5, figsize=(15, 5), layout="constrained")
    for axis, (title, tags) in zip(axes.flat, charts, strict=True):
        for tag in tags:
            points = [(x["step"] / 1000, x[tag]) for x in metrics if x.get(tag) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    label=tag.split("/")[-1],
                    linewidth=1,
                    marker=marker(points),
                    markersize=3,
                )
        axis.set_title(title, fontsize=8)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False, fontsize=7)
        else:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.text(0.5, 0.5, "not in this run", ha="center", fontsize=8, color="gray")
    for axis in axes[-1]:
        axis.set_xlabel("thousand frames", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    plt.close(figure)
    return ".png", buffer.getvalue()
