"""The results of a study's runs: from their folders, or from the files of an earlier report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentplan.config.loading import load
from latentplan.inspection.curves import Curve, read_curve, read_curves
from latentplan.study.matrix import Job
from latentplan.study.run_metrics import RunMetrics, measure, read_run_metrics
from latentplan.types import UserError


class Result(NamedTuple):
    """The result of one run, which has been evaluated."""

    curve: Curve
    metrics: RunMetrics
    done: bool

    @property
    def final(self) -> float:
        """The return of the last evaluation."""
        return self.curve.rows[-1]["mean"]

    @property
    def area(self) -> float:
        """The area under the curve, divided by its length: the mean over all evaluations."""
        return float(np.mean([row["mean"] for row in self.curve.rows]))

    @property
    def planner(self) -> float | None:
        """The planner's return in the last evaluation."""
        return self.curve.rows[-1]["planner"]

    @property
    def advantage(self) -> float | None:
        """By how much the planner's return is above the actor's, in the last evaluation."""
        return None if self.planner is None else self.planner - self.final

    @property
    def minutes(self) -> float:
        """The wall clock of the run."""
        return self.curve.rows[-1]["seconds"] / 60

    def frames_to(self, level: float) -> tuple[int, bool]:
        """The frames to the first evaluation at ``level``; where none is, to the end, and False."""
        for row in self.curve.rows:
            if row["mean"] >= level:
                return row["frame"], True
        return self.curve.rows[-1]["frame"], False


Panels = dict[str, dict[str, list[Result]]]  # by task, then ablation: the results of its runs


def from_folders(matrix: Sequence[Job]) -> dict[Job, Result]:
    """The results of runs whose folders are here."""
    results = {}
    for task in dict.fromkeys(job.task for job in matrix):
        group = [job for job in matrix if job.task == task]
        measured = measure([job.folder for job in group], [job.seed for job in group])
        for job, metrics in zip(group, measured, strict=True):
            results[job] = Result(read_curve(job.folder), metrics, job.done())
    return results


def from_report(matrix: Sequence[Job], earlier: Path) -> dict[Job, Result]:
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
