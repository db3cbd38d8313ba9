"""All tasks of a study in one line per ablation, with how sure that is (Agarwal et al. 2021).

Runs are few and far apart, so a mean alone says little. Intervals are of a stratified bootstrap:
runs are drawn anew, with replacement, within every task of every ablation. With three runs in each
they are too narrow rather than too wide, and say nothing of tasks that are not in the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

DRAWS = 10_000
COVERED = 95  # percent of the draws lie in an interval

Scores = Mapping[str, Mapping[str, Sequence[float]]]  # task, ablation -> a score per run
Drawn = Sequence[NDArray[np.float64]]  # of every task, (DRAWS, runs)


class Estimate(NamedTuple):
    """A statistic and its interval."""

    value: float
    low: float
    high: float


class Aggregate(NamedTuple):
    """Of one ablation over all tasks."""

    mean: Estimate  # of the tasks' means
    iqm: Estimate  # interquartile mean: that of the middle half of all runs
    better: Estimate | None  # than the first ablation, see :func:`_better`; None of itself


def aggregate(scores: Scores) -> dict[str, Aggregate]:
    """Every ablation over all tasks, and against the first of them.

    Args:
        scores: every task has the same ablations, and a run at least of each.

    Returns:
        An aggregate per ablation. The same runs give the same intervals.
    """
    tasks = list(scores.values())
    ablations = list(tasks[0])
    draw = np.random.default_rng(0)
    kept, drawn = {}, {}
    for name in ablations:
        kept[name] = [np.asarray(of_task[name], float)[None] for of_task in tasks]
        again = [draw.integers(runs.size, size=(DRAWS, runs.size)) for runs in kept[name]]
        drawn[name] = [runs[0, rows] for runs, rows in zip(kept[name], again, strict=True)]
    first = ablations[0]
    return {
        name: Aggregate(
            _estimate(_mean(kept[name]), _mean(drawn[name])),
            _estimate(_iqm(kept[name]), _iqm(drawn[name])),
            _estimate(_better(kept[name], kept[first]), _better(drawn[name], drawn[first]))
            if name != first
            else None,
        )
        for name in ablations
    }


def _estimate(value: NDArray, draws: NDArray) -> Estimate:
    outside = (100 - COVERED) / 2
    low, high = np.percentile(draws, [outside, 100 - outside])
    return Estimate(float(value[0]), float(low), float(high))


def _mean(tasks: Drawn) -> NDArray:
    """Every task counts the same, however many runs it has."""
    return np.mean([runs.mean(1) for runs in tasks], 0)


def _iqm(tasks: Drawn) -> NDArray:
    return trim_mean(np.concatenate(tasks, 1), 0.25, axis=1)


def _better(tasks: Drawn, others: Drawn) -> NDArray:
    """How often a run is above one of the others on the same task, of all pairs; a tie is half.

    One half says nothing; units do not matter. Their "probability of improvement".
    """
    shares = []
    for runs, other in zip(tasks, others, strict=True):
        gap = np.sign(runs[:, :, None] - other[:, None, :])
        shares.append((gap.mean((1, 2)) + 1) / 2)
    return np.mean(shares, 0)
