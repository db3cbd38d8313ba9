"""``latentplan study report``: curves, returns, statistics and metrics of all runs of a study."""

from __future__ import annotations

import datetime
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentplan.inspection.curves import draw_curves, missing, report_path, write_curves
from latentplan.inspection.plots import pyplot
from latentplan.study.html_page import Figure, Part, page
from latentplan.study.matrix import jobs
from latentplan.study.results import Panels, from_folders, from_report
from latentplan.study.run_metrics import write_run_metrics
from latentplan.study.statistics import BEST, CONFIDENCE, profile
from latentplan.study.study_file import read_study
from latentplan.study.tables import (
    Table,
    beside_published,
    one_unit,
    over_tasks,
    per_task,
    shared_tasks,
)
from latentplan.types import UserError

MOST_TASKS = 4  # that a title names
LEVELS = (BEST * np.linspace(0, 1, 41)).tolist()  # returns, of the performance profiles


def title_of(name: str, tasks: Sequence[str]) -> str:
    """The title of a report: its name, its tasks and the date of today."""
    named = ", ".join(tasks) if len(tasks) <= MOST_TASKS else f"{len(tasks)} tasks"
    return f"{name}: {named}, {datetime.date.today().isoformat()}"


def report(path: Path, out: Path, also: Sequence[Path] = ()) -> str:
    """Write ``out``.csv and .json (curves), ``out``_run_metrics.csv, ``out``.png and ``out``.html.

    The title of the figure has the name of the study, its tasks and the date.

    All metrics of a run are blank if its replay is missing or no longer has its first rows. Metrics
    that need the model are blank if the checkpoint has another architecture.

    Args:
        path: the file of the study.
        out: path of the report without a suffix.
        also: the ``out`` of earlier reports, for runs of the study whose folders are missing.

    Returns:
        Markdown: a table with a row per task and ablation. If the study has several tasks and
        several ablations with several runs each, two tables have a row per ablation. Sentences at
        the end name what is missing.

    Raises:
        UserError: no run of the study has been evaluated yet, a run is damaged or has other
            settings than the study, an earlier report cannot be read, or it has a run of that name
            with other observations or another size.
    """
    study = read_study(path)
    matrix = jobs(study, path)
    results = from_folders([job for job in matrix if job.progress().score is not None])
    for earlier in also:
        results |= from_report([job for job in matrix if job not in results], earlier)
    if not results:
        raise UserError(f"No run of {path} has been evaluated yet.")
    results = {job: results[job] for job in matrix if job in results}
    panels: Panels = {}
    for job, result in results.items():
        # The configuration of a variant has the name of the ablation that it builds on.
        result.curve.description["ablation"] = job.ablation
        panels.setdefault(job.task, {}).setdefault(job.ablation, []).append(result)
    write_curves([result.curve for result in results.values()], out)
    write_run_metrics({job: result.metrics for job, result in results.items()}, out)
    curves = {
        task: {name: [run.curve for run in group] for name, group in groups.items()}
        for task, groups in panels.items()
    }
    title = title_of(path.stem, list(panels))
    figure = report_path(out, ".png")
    draw_curves(curves, figure, title=title)
    known = {job.ablation for job in results}
    ablations = [name for name in dict.fromkeys(job.ablation for job in matrix) if name in known]
    published, notes = beside_published(panels)
    tables = [per_task(panels, study.threshold), *over_tasks(panels, ablations), *published]
    notes += missing(curves)
    absent = [job.folder.name for job in matrix if job not in results]
    if absent:
        notes.append(f"Not evaluated yet, and left out: {', '.join(absent)}.")
    figures = [Figure(".png", figure.read_bytes(), "Evaluation return of the mean action.", True)]
    figures += _profiles(shared_tasks(panels, ablations), ablations)
    report_path(out, ".html").write_text(_page(title, tables, figures, notes), encoding="utf-8")
    return "\n\n".join([*(table.markdown() for table in tables), *notes])


def _page(
    title: str, tables: Sequence[Table], figures: Sequence[Figure], notes: Sequence[str]
) -> str:
    parts: list[Part] = [("table", table) for table in tables]
    parts += [("figure", figure) for figure in figures]
    return page(title, [*parts, *(("p", note) for note in notes)])


def _profiles(panels: Panels, ablations: Sequence[str]) -> list[Figure]:
    """The performance profiles of the final returns, where these have one unit."""
    if len(ablations) < 2 or not panels or not one_unit([*panels]):
        return []
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in ablations:
        tasks = [np.array([run.final for run in groups[name]]) for groups in panels.values()]
        value, low, high = zip(*profile(tasks, LEVELS), strict=True)
        (line,) = axis.plot(LEVELS, value, label=name)
        axis.fill_between(LEVELS, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel="final return", ylabel="fraction of runs above it", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    caption = f"Performance profiles, with {CONFIDENCE} % of stratified bootstrap samples."
    return [Figure(".png", buffer.getvalue(), caption)]
