"""The tables of a study's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from latentplan.config.tasks import parse_task
from latentplan.study.published import PUBLISHED_REPEAT, published, why_not_comparable
from latentplan.study.results import Panels, Result
from latentplan.study.run_metrics import UNKNOWN
from latentplan.study.statistics import (
    CONFIDENCE,
    POWER,
    Estimate,
    aggregate,
    mean_of_runs,
    median_frames,
    runs_needed,
)

GAINS = (0.1, 0.2, 0.3)  # differences for which the number of runs is given
HEAD = (
    "task",
    "ablation",
    f"final return: mean [{CONFIDENCE} % by a bootstrap over seeds] (each seed)",
    "mean of the curve",
    "planner, final",
    "planner minus actor",
    "frames to the level: median (runs that reach it)",
    "minutes",
    "seconds per update",
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


class Table(NamedTuple):
    """A table, and sentences below it."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]  # texts, or values for an HTML page
    caption: str = ""

    def markdown(self) -> str:
        """The table in Markdown, with its caption."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"{text}\n\n{self.caption}" if self.caption else text


def per_task(panels: Panels, threshold: float) -> Table:
    """A row per task and ablation.

    Args:
        threshold: the level of "frames to the level"; 0: half of the task's best final return,
            or one and a half of it where it is negative.
    """
    rows, levels = [], {}
    for task, groups in panels.items():
        best = max(float(np.mean([run.final for run in group])) for group in groups.values())
        levels[task] = threshold or best - abs(best) / 2
        rows += [_row(task, name, group, levels[task]) for name, group in groups.items()]
    if threshold:
        return Table(HEAD, rows, f"The level is a return of {threshold:g}.")
    named = ", ".join(f"{level:.0f} for {task}" for task, level in levels.items())
    times = "half" if all(level >= 0 for level in levels.values()) else "half (1.5 if negative)"
    return Table(HEAD, rows, f"The level is {times} of the task's best final return: {named}.")


def _row(task: str, ablation: str, group: Sequence[Result], level: float) -> list[str]:
    final = [run.final for run in group]
    frames, reached = zip(*(run.frames_to(level) for run in group), strict=True)
    median = median_frames(frames, reached)
    known = [run.metrics for run in group if run.metrics != UNKNOWN]
    first, *rest = zip(*(known or [UNKNOWN]), strict=True)
    never = "never" if known and all(x is None for x in first) else _average(first, 0)
    if None in first and any(x is not None for x in first):
        never += f" ({sum(x is None for x in first)} never)"
    *measured, updates = rest
    digits = (0, 3, 3, 2, 2, 2, 2, 0)
    return [
        task,
        _label(ablation, group),
        f"{_with_interval(final)} ({', '.join(f'{x:.0f}' for x in final)})",
        _average([run.area for run in group], 0),
        _average([run.planner for run in group], 0),
        _average([run.advantage for run in group], 0),
        f"{'' if median is None else f'{median:,.0f} '}({sum(reached)} of {len(group)})",
        _average([run.minutes for run in group], 1),
        _average(updates, 3),
        never,
        *(_average(values, d) for values, d in zip(measured, digits, strict=True)),
    ]


def shared_tasks(panels: Panels, ablations: Sequence[str]) -> Panels:
    """The tasks on which every ablation has at least two runs."""
    return {
        task: groups
        for task, groups in panels.items()
        if all(len(groups.get(name, ())) > 1 for name in ablations)
    }


def one_unit(tasks: Sequence[str]) -> bool:
    """Whether returns of these tasks have the same meaning.

    All returns of the Control Suite, except those of lqr, are between 0 and 1000. Returns of other
    environments have different units, so their means over tasks have no meaning.
    """
    return all(parse_task(task)[0] == "dmc" for task in tasks)


def over_tasks(panels: Panels, ablations: Sequence[str]) -> list[Table]:
    """Tables of the ablations over all tasks, compared with the first one: final return and curve.

    Tasks are left out where an ablation has fewer than two runs. The result is empty if fewer than
    two tasks or two ablations are left.
    """
    shared = shared_tasks(panels, ablations)
    if len(shared) < 2 or len(ablations) < 2:
        return []
    final, area = (
        {
            task: {name: [getattr(x, kind) for x in groups[name]] for name in ablations}
            for task, groups in shared.items()
        }
        for kind in ("final", "area")
    )
    names = f"[{CONFIDENCE} % of stratified bootstrap samples; {', '.join(shared)}]"
    power = _power(runs_needed(area, GAINS))
    labels = {
        name: _label(name, [run for groups in shared.values() for run in groups[name]])
        for name in ablations
    }
    return [
        _aggregated("final return", final, labels)._replace(caption=names),
        _aggregated("mean of the curve", area, labels)._replace(caption=f"{names} {power}"),
    ]


def _aggregated(
    title: str, scores: dict[str, dict[str, list[float]]], labels: dict[str, str]
) -> Table:
    """A row per ablation. The units of means matter, those of comparisons do not."""
    baseline = next(iter(labels))
    means = ["mean", "median", "interquartile mean", "optimality gap"] * one_unit([*scores])
    head = [f"{title} over {len(scores)} tasks", *means]
    head += [f"better than {baseline}", f"ratio to {baseline}"]
    rows = []
    for name, found in aggregate(scores, baseline).items():
        values = [_interval(x, 0) for x in found[:3]] + [_interval(found.gap, 3)]
        compared = [_interval(x, 2) if x else "" for x in (found.improvement, found.ratio)]
        rows.append([labels[name], *values[: len(means)], *compared])
    return Table(head, rows)


def _power(needed: list[int] | None) -> str:
    """The sentence on how many runs would show a difference."""
    if needed is None:
        return ""
    numbers = ", ".join(f"{n} for {gain:.0%}" for n, gain in zip(needed, GAINS, strict=True))
    return (
        f"By the variance between these runs, so many runs per task and ablation would show a "
        f"difference of the mean of the curve with a probability of {POWER:.0%}: {numbers}."
    )


def beside_published(panels: Panels) -> tuple[list[Table], list[str]]:
    """Published returns of evaluations beside those of this study, and why there are none."""
    rows: list[list[str]] = []
    without: dict[str, list[str]] = {}  # tasks by the reason
    for task, groups in panels.items():
        name, runs = parse_task(task), [run for group in groups.values() for run in group]
        reason = why_not_comparable(name, [run.curve.description["obs"] for run in runs])
        if reason is None and any(run.curve.description["obs"] != "pixels" for run in runs):
            reason = "not all of these runs are from pixels"
        repeats = {run.curve.description.get("repeat") for run in runs}
        if reason is None and repeats != {PUBLISHED_REPEAT}:
            named = ", ".join(map(str, sorted(repeats, key=str)))
            reason = f"they are for action repeat {PUBLISHED_REPEAT}, and these runs have {named}"
        found = [] if reason else _rows_of_published(task, groups)
        if not found:
            reason = reason or "no evaluation of these runs is at their frames"
            without.setdefault(reason, []).append(task)
        rows += found
    head = ("task", "frames", "ours: mean of each ablation", "published: mean over seeds")
    notes = [
        f"No published returns stand beside {', '.join(tasks)}: {reason}."
        for reason, tasks in without.items()
    ]
    return [Table(head, rows)] if rows else [], notes


def _rows_of_published(task: str, groups: dict[str, list[Result]]) -> list[list[str]]:
    """A row per number of frames at which both were evaluated."""
    known = [x for rows in published(parse_task(task)).values() for x in rows if not x.training]
    rows = []
    for frames in sorted({x.frames for x in known}):
        ours = {}
        for name, group in groups.items():
            means = [x["mean"] for run in group for x in run.curve.rows if x["frame"] == frames]
            if len(means) == len(group):
                ours[name] = np.mean(means)
        if ours:
            own = ", ".join(f"{name} {mean:.0f}" for name, mean in ours.items())
            others = ", ".join(f"{x.method} {x.mean:.0f}" for x in known if x.frames == frames)
            rows.append([task, f"{frames:,}", own, others])
    return rows


def _label(ablation: str, group: Sequence[Result]) -> str:
    return ablation if all(run.done for run in group) else f"{ablation} (unfinished)"


def _with_interval(scores: Sequence[float]) -> str:
    """A mean over runs, with its interval if there are several runs."""
    mean = mean_of_runs(scores)
    return f"{mean.value:.0f}" if len(scores) == 1 else _interval(mean, 0)


def _interval(x: Estimate, digits: int) -> str:
    return f"{x.value:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"


def _average(values: Sequence[float | None], digits: int) -> str:
    known = [x for x in values if x is not None and np.isfinite(x)]
    return f"{np.mean(known):,.{digits}f}" if known else ""
