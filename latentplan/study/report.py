"""``latentplan study report``: curves, returns and mechanisms of a study's runs, none left out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentplan.study.curves import Curve, draw_curves, read_curve, write_curves
from latentplan.study.matrix import Job, jobs, read_study
from latentplan.study.mechanisms import Mechanisms, measure
from latentplan.types import UserError

HEAD = (
    "task",
    "ablation",
    "final return: mean (each seed)",
    "mean of the curve",
    "planner, final",
    "frames to reward",
    "cells",
    "reward error",
    "latent error",
    "rank, reward",
    "rank, latent",
    "bonus share, exploring",
    "bonus share, imagining",
    "training return, last half",
)


def report(path: Path, out: Path) -> str:
    """Write ``out``.csv and .json (curves), ``out``_mechanisms.csv and ``out``.png.

    Returns:
        A Markdown table, a row per task and ablation.

    Raises:
        UserError: no run of the study has been evaluated yet, or a run is damaged.
    """
    matrix = [job for job in jobs(read_study(path), path) if job.progress().score is not None]
    if not matrix:
        raise UserError(f"No run of {path} has been evaluated yet.")
    curves = {job: read_curve(job.folder) for job in matrix}
    write_curves(list(curves.values()), out)
    measured: dict[Job, Mechanisms] = {}
    panels: dict[str, dict[str, list[Curve]]] = {}
    for task in dict.fromkeys(job.task for job in matrix):
        of_task = [job for job in matrix if job.task == task]
        found = measure([job.folder for job in of_task], [job.seed for job in of_task])
        measured |= dict(zip(of_task, found, strict=True))
        groups = panels.setdefault(task, {})
        for job in of_task:
            groups.setdefault(job.ablation, []).append(curves[job])
    _write_mechanisms(measured, out.with_name(f"{out.name}_mechanisms.csv"))
    draw_curves(panels, out.with_suffix(".png"))
    rows = [
        _row(task, ablation, [x for x in matrix if x[:2] == (task, ablation)], curves, measured)
        for task, groups in panels.items()
        for ablation in groups
    ]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _row(
    task: str,
    ablation: str,
    group: Sequence[Job],
    curves: dict[Job, Curve],
    measured: dict[Job, Mechanisms],
) -> list[str]:
    final = [curves[job].rows[-1]["mean"] for job in group]
    planner = [curves[job].rows[-1]["planner"] for job in group]
    means = [np.mean([row["mean"] for row in curves[job].rows]) for job in group]
    columns = zip(*(measured[job] for job in group), strict=True)
    first, *rest = columns
    never = "never" if all(x is None for x in first) else _average(first, 0)
    if None in first and never != "never":
        never += f" ({sum(x is None for x in first)} never)"
    digits = (0, 3, 3, 2, 2, 2, 2, 0)
    return [
        task,
        ablation if all(job.done() for job in group) else f"{ablation} (unfinished)",
        f"{np.mean(final):.0f} ({', '.join(f'{x:.0f}' for x in final)})",
        _average(means, 0),
        _average(planner, 0),
        never,
        *(_average(values, d) for values, d in zip(rest, digits, strict=True)),
    ]


def _average(values: Sequence[float | None], digits: int) -> str:
    known = [x for x in values if x is not None and np.isfinite(x)]
    return f"{np.mean(known):,.{digits}f}" if known else ""


def _write_mechanisms(measured: dict[Job, Mechanisms], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "ablation", "seed", *Mechanisms._fields))
        for job, found in measured.items():
            values = (round(x, 4) if isinstance(x, float) else x for x in found)
            writer.writerow((job.task, job.ablation, job.seed, *values))
