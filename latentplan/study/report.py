"""``latentplan study report``: curves, returns and mechanisms of a study's runs, none left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentplan.config.loading import load
from latentplan.config.tasks import parse_task
from latentplan.inspection.curves import (
    Curve,
    draw_curves,
    file_of,
    read_curve,
    read_curves,
    write_curves,
)
from latentplan.study.matrix import Job, jobs, read_study
from latentplan.study.run_metrics import (
    UNKNOWN,
    Mechanisms,
    measure,
    read_mechanisms,
    write_mechanisms,
)
from latentplan.study.statistics import CONFIDENCE, Estimate, aggregate
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


class Result(NamedTuple):
    """Of one run."""

    curve: Curve
    mechanisms: Mechanisms
    done: bool


Panels = dict[str, dict[str, list[Result]]]  # task, ablation


def report(path: Path, out: Path, also: Sequence[Path] = ()) -> str:
    """Write ``out``.csv and .json (curves), ``out``_mechanisms.csv and ``out``.png.

    Args:
        also: earlier reports (their ``out``), for runs of the study whose folders are not here.

    Of a run whose replay is gone, or has forgotten its first rows, the mechanisms are left blank;
    of one whose checkpoint is of another architecture, those that need the model.

    Returns:
        A Markdown table, a row per task and ablation; and where there are several of both, with
        several runs each, another, a row per ablation.

    Raises:
        UserError: no run of the study has been evaluated yet, a run is damaged or has other
            settings than the study, an earlier report cannot be read, or has a run of that name
            from other observations or of another size.
    """
    matrix = jobs(read_study(path), path)
    results = _of_folders([job for job in matrix if job.progress().score is not None])
    for earlier in also:
        results |= _of_report([job for job in matrix if job not in results], earlier)
    if not results:
        raise UserError(f"No run of {path} has been evaluated yet.")
    results = {job: results[job] for job in matrix if job in results}
    for job, result in results.items():  # a variant by its own name, not the one it begins with
        result.curve.what["ablation"] = job.ablation
    write_curves([result.curve for result in results.values()], out)
    write_mechanisms({job: result.mechanisms for job, result in results.items()}, out)
    panels: Panels = {}
    for job, result in results.items():
        panels.setdefault(job.task, {}).setdefault(job.ablation, []).append(result)
    curves = {
        task: {ablation: [result.curve for result in group] for ablation, group in groups.items()}
        for task, groups in panels.items()
    }
    draw_curves(curves, file_of(out, ".png"))
    rows = [
        _row(task, ablation, group)
        for task, groups in panels.items()
        for ablation, group in groups.items()
    ]
    known = {job.ablation for job in results}
    ablations = [name for name in dict.fromkeys(job.ablation for job in matrix) if name in known]
    return "\n\n".join([_table(HEAD, rows), *_over_tasks(panels, ablations)])


def _of_folders(matrix: Sequence[Job]) -> dict[Job, Result]:
    results = {}
    for task in dict.fromkeys(job.task for job in matrix):
        of_task = [job for job in matrix if job.task == task]
        measured = measure([job.folder for job in of_task], [job.seed for job in of_task])
        for job, found in zip(of_task, measured, strict=True):
            results[job] = Result(read_curve(job.folder), found, job.done())
    return results


def _of_report(matrix: Sequence[Job], earlier: Path) -> dict[Job, Result]:
    """The runs among these that the report has."""
    curves, mechanisms = read_curves(earlier), read_mechanisms(earlier)
    results = {}
    for job in matrix:
        curve = curves.get(job.folder.name)
        if not curve or not curve.rows:
            continue
        config = load([], job.overrides)
        for key in ("obs", "size"):
            if curve.what[key] != getattr(config, key):
                raise UserError(f"{curve.what['run']} of {earlier} has {key}={curve.what[key]}.")
        if job[:3] not in mechanisms:
            raise UserError(f"{earlier} has no mechanisms of {curve.what['run']}.")
        done = curve.rows[-1]["frame"] >= job.steps
        results[job] = Result(curve, mechanisms[job[:3]], done)
    return results


def _row(task: str, ablation: str, group: Sequence[Result]) -> list[str]:
    final = [*map(_final, group)]
    planner = [result.curve.rows[-1]["planner"] for result in group]
    means = [*map(_mean_of_curve, group)]
    known = [result.mechanisms for result in group if result.mechanisms != UNKNOWN]
    first, *rest = zip(*(known or [UNKNOWN]), strict=True)
    never = "never" if known and all(x is None for x in first) else _average(first, 0)
    if None in first and any(x is not None for x in first):
        never += f" ({sum(x is None for x in first)} never)"
    digits = (0, 3, 3, 2, 2, 2, 2, 0)
    return [
        task,
        _label(ablation, group),
        f"{np.mean(final):.0f} ({', '.join(f'{x:.0f}' for x in final)})",
        _average(means, 0),
        _average(planner, 0),
        never,
        *(_average(values, d) for values, d in zip(rest, digits, strict=True)),
    ]


def _over_tasks(panels: Panels, ablations: Sequence[str]) -> list[str]:
    """The table of ablations over the tasks that all of them have several runs of, against the
    first; none where there is nothing to put together."""
    shared = {
        task: groups
        for task, groups in panels.items()
        if all(len(groups.get(name, ())) > 1 for name in ablations)
    }
    if len(shared) < 2 or len(ablations) < 2:
        return []
    baseline = ablations[0]
    found = [
        aggregate(
            {
                task: {name: [*map(score, groups[name])] for name in ablations}
                for task, groups in shared.items()
            },
            baseline,
        )
        for score in (_final, _mean_of_curve)
    ]
    # Returns of the Control Suite are of one unit (from 0 to 1000, but for lqr).
    one_unit = all(parse_task(task)[0] == "dmc" for task in shared)
    head = [f"over {len(shared)} tasks"]
    for title in ("final return", "mean of the curve"):
        head += [f"{title}: mean", "interquartile mean"] if one_unit else []
        head.append(f"better than {baseline}" if one_unit else f"{title}: better than {baseline}")
    rows = []
    for name in ablations:
        row = [_label(name, [run for groups in shared.values() for run in groups[name]])]
        for mean, iqm, improvement in (aggregates[name] for aggregates in found):
            row += [_interval(x, 0) for x in (mean, iqm)] if one_unit else []
            row.append(_interval(improvement, 2) if improvement else "")
        rows.append(row)
    names = ", ".join(shared)
    return [_table(head, rows), f"[{CONFIDENCE} % of stratified bootstrap samples; {names}]"]


def _label(ablation: str, group: Sequence[Result]) -> str:
    return ablation if all(result.done for result in group) else f"{ablation} (unfinished)"


def _final(result: Result) -> float:
    return result.curve.rows[-1]["mean"]


def _mean_of_curve(result: Result) -> float:
    return float(np.mean([row["mean"] for row in result.curve.rows]))


def _interval(x: Estimate, digits: int) -> str:
    return f"{x.value:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _average(values: Sequence[float | None], digits: int) -> str:
    known = [x for x in values if x is not None and np.isfinite(x)]
    return f"{np.mean(known):,.{digits}f}" if known else ""
