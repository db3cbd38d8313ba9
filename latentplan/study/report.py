"""``latentplan study report``: curves, returns and metrics of all runs of a study."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentplan.config.loading import load
from latentplan.config.tasks import parse_task
from latentplan.inspection.curves import (
    Curve,
    draw_curves,
    missing,
    read_curve,
    read_curves,
    report_path,
    write_curves,
)
from latentplan.study.matrix import Job, jobs
from latentplan.study.run_metrics import (
    UNKNOWN,
    RunMetrics,
    measure,
    read_run_metrics,
    write_run_metrics,
)
from latentplan.study.statistics import CONFIDENCE, Estimate, aggregate, mean_of_runs
from latentplan.study.study_file import read_study
from latentplan.types import UserError

MOST_TASKS = 4  # that a title names
HEAD = (
    "task",
    "ablation",
    f"final return: mean [{CONFIDENCE} % by a bootstrap over seeds] (each seed)",
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
    """The result of one run."""

    curve: Curve
    metrics: RunMetrics
    done: bool


def title_of(name: str, tasks: Sequence[str]) -> str:
    """The title of a report: its name, its tasks and the date of today."""
    named = ", ".join(tasks) if len(tasks) <= MOST_TASKS else f"{len(tasks)} tasks"
    return f"{name}: {named}, {datetime.date.today().isoformat()}"


Panels = dict[str, dict[str, list[Result]]]  # by task, then ablation: the results of its runs


def report(path: Path, out: Path, also: Sequence[Path] = ()) -> str:
    """Write ``out``.csv and .json (curves), ``out``_run_metrics.csv and ``out``.png.

    The title of the figure has the name of the study, its tasks and the date.

    All metrics of a run are blank if its replay is missing or no longer has its first rows. Metrics
    that need the model are blank if the checkpoint has another architecture.

    Args:
        path: the file of the study.
        out: path of the report without a suffix.
        also: the ``out`` of earlier reports, for runs of the study whose folders are missing.

    Returns:
        A Markdown table with a row per task and ablation. If the study has several tasks and
        several ablations with several runs each, a second table has a row per ablation. Sentences
        at the end name missing curves.

    Raises:
        UserError: no run of the study has been evaluated yet, a run is damaged or has other
            settings than the study, an earlier report cannot be read, or it has a run of that name
            with other observations or another size.
    """
    matrix = jobs(read_study(path), path)
    results = _from_folders([job for job in matrix if job.progress().score is not None])
    for earlier in also:
        results |= _from_report([job for job in matrix if job not in results], earlier)
    if not results:
        raise UserError(f"No run of {path} has been evaluated yet.")
    results = {job: results[job] for job in matrix if job in results}
    for job, result in results.items():
        # The configuration of a variant has the name of the ablation that it builds on.
        result.curve.description["ablation"] = job.ablation
    write_curves([result.curve for result in results.values()], out)
    write_run_metrics({job: result.metrics for job, result in results.items()}, out)
    panels: Panels = {}
    for job, result in results.items():
        panels.setdefault(job.task, {}).setdefault(job.ablation, []).append(result)
    curves = {
        task: {ablation: [result.curve for result in group] for ablation, group in groups.items()}
        for task, groups in panels.items()
    }
    title = title_of(path.stem, list(panels))
    draw_curves(curves, report_path(out, ".png"), title=title)
    rows = [
        _row(task, ablation, group)
        for task, groups in panels.items()
        for ablation, group in groups.items()
    ]
    known = {job.ablation for job in results}
    ablations = [name for name in dict.fromkeys(job.ablation for job in matrix) if name in known]
    absent = [job.folder.name for job in matrix if job not in results]
    notes = missing(curves)
    if absent:
        notes.append(f"Not evaluated yet, and left out: {', '.join(absent)}.")
    return "\n\n".join([_table(HEAD, rows), *_over_tasks(panels, ablations), *notes])


def _from_folders(matrix: Sequence[Job]) -> dict[Job, Result]:
    results = {}
    for task in dict.fromkeys(job.task for job in matrix):
        group = [job for job in matrix if job.task == task]
        measured = measure([job.folder for job in group], [job.seed for job in group])
        for job, metrics in zip(group, measured, strict=True):
            results[job] = Result(read_curve(job.folder), metrics, job.done())
    return results


def _from_report(matrix: Sequence[Job], earlier: Path) -> dict[Job, Result]:
    """The results of those runs that an earlier report has."""
    curves, metrics = read_curves(earlier), read_run_metrics(earlier)
    results = {}
    for job in matrix:
        curve = curves.get(job.folder.name)
        if not curve or not curve.rows:
            continue
        config = load([], job.overrides)
        for key in ("obs", "size"):
            value = curve.description[key]
            if value != getattr(config, key):
                raise UserError(f"{job.folder.name} of {earlier} has {key}={value}.")
        if job[:3] not in metrics:
            raise UserError(f"{earlier} has no metrics of {job.folder.name}.")
        done = curve.rows[-1]["frame"] >= job.steps
        results[job] = Result(curve, metrics[job[:3]], done)
    return results


def _row(task: str, ablation: str, group: Sequence[Result]) -> list[str]:
    final = [*map(_final, group)]
    planner = [result.curve.rows[-1]["planner"] for result in group]
    means = [*map(_mean_of_curve, group)]
    known = [result.metrics for result in group if result.metrics != UNKNOWN]
    first, *rest = zip(*(known or [UNKNOWN]), strict=True)
    never = "never" if known and all(x is None for x in first) else _average(first, 0)
    if None in first and any(x is not None for x in first):
        never += f" ({sum(x is None for x in first)} never)"
    digits = (0, 3, 3, 2, 2, 2, 2, 0)
    return [
        task,
        _label(ablation, group),
        f"{_with_interval(final)} ({', '.join(f'{x:.0f}' for x in final)})",
        _average(means, 0),
        _average(planner, 0),
        never,
        *(_average(values, d) for values, d in zip(rest, digits, strict=True)),
    ]


def _over_tasks(panels: Panels, ablations: Sequence[str]) -> list[str]:
    """A table of the ablations over all tasks, compared with the first one, and its caption.

    Tasks are left out where an ablation has fewer than two runs. The result is empty if fewer than
    two tasks or two ablations are left.
    """
    shared = {
        task: groups
        for task, groups in panels.items()
        if all(len(groups.get(name, ())) > 1 for name in ablations)
    }
    if len(shared) < 2 or len(ablations) < 2:
        return []
    baseline = ablations[0]
    statistics = [
        aggregate(
            {
                task: {name: [*map(score, groups[name])] for name in ablations}
                for task, groups in shared.items()
            },
            baseline,
        )
        for score in (_final, _mean_of_curve)
    ]
    # All returns of the Control Suite, except those of lqr, are between 0 and 1000. Returns of
    # other environments have different units, so their means over tasks have no meaning.
    one_unit = all(parse_task(task)[0] == "dmc" for task in shared)
    head = [f"over {len(shared)} tasks"]
    for title in ("final return", "mean of the curve"):
        head += [f"{title}: mean", "interquartile mean"] if one_unit else []
        head.append(f"better than {baseline}" if one_unit else f"{title}: better than {baseline}")
    rows = []
    for name in ablations:
        row = [_label(name, [run for groups in shared.values() for run in groups[name]])]
        for mean, iqm, improvement in (aggregates[name] for aggregates in statistics):
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


def _with_interval(scores: Sequence[float]) -> str:
    """A mean over runs, with its interval if there are several runs."""
    mean = mean_of_runs(scores)
    return f"{mean.value:.0f}" if len(scores) == 1 else _interval(mean, 0)


def _interval(x: Estimate, digits: int) -> str:
    return f"{x.value:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _average(values: Sequence[float | None], digits: int) -> str:
    known = [x for x in values if x is not None and np.isfinite(x)]
    return f"{np.mean(known):,.{digits}f}" if known else ""
