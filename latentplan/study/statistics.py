"""All tasks of a study in one line per ablation, with how sure that is (Agarwal et al. 2021).

Runs are few and far apart, so a mean alone says little. Intervals are of a stratified bootstrap:
runs are drawn anew, with replacement, within every task of every ablation. Of three runs on each
of four tasks they cover less than they say (a mean's 86 % instead of 95, were returns normal), and
they say nothing of tasks that are not in the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

RESAMPLES = 10_000
CONFIDENCE = 95  # percent of the resamples lie in an interval

Scores = Mapping[str, Mapping[str, Sequence[float]]]  # task, ablation -> a score per run
Samples = Sequence[NDArray[np.float64]]  # of every task (S, runs): S resamples, or the runs alone


class Estimate(NamedTuple):
    """A statistic and its interval."""

    value: float
    low: float
    high: float


class Aggregate(NamedTuple):
    """Of one ablation over all tasks."""

    mean: Estimate  # of the tasks' means
    iqm: Estimate  # interquartile mean, of the middle half of all runs
    improvement: Estimate | None  # probability of improvement on the baseline, which has None


def aggregate(scores: Scores, baseline: str) -> dict[str, Aggregate]:
    """Every ablation over all tasks, and against the baseline.

    Args:
        scores: every task has the same ablations, and two runs at least of each.
        baseline: one of the ablations.
    """
    rng = np.random.default_rng(0)
    tasks = list(scores.values())
    runs, resampled = {}, {}
    for name in tasks[0]:
        runs[name] = [np.asarray(of_task[name], float)[None] for of_task in tasks]
        resampled[name] = [x[0, rng.integers(x.size, size=(RESAMPLES, x.size))] for x in runs[name]]
    found = {}
    for name in runs:
        improvement = None
        if name != baseline:
            improvement = _estimate(
                _improvement(runs[name], runs[baseline]),
                _improvement(resampled[name], resampled[baseline]),
            )
        mean = _estimate(_mean(runs[name]), _mean(resampled[name]))
        iqm = _estimate(_iqm(runs[name]), _iqm(resampled[name]))
        found[name] = Aggregate(mean, iqm, improvement)
    return found


def _estimate(value: NDArray, resampled: NDArray) -> Estimate:
    outside = (100 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [outside, 100 - outside])
    return Estimate(float(value[0]), float(low), float(high))


def _mean(tasks: Samples) -> NDArray:
    """(S,) Every task counts the same, however many runs it has."""
    return np.mean([runs.mean(1) for runs in tasks], 0)


def _iqm(tasks: Samples) -> NDArray:
    """(S,) Every run counts the same; of three runs or fewer in all, it is their mean."""
    return trim_mean(np.concatenate(tasks, 1), 0.25, axis=1)


def _improvement(tasks: Samples, others: Samples) -> NDArray:
    """(S,) How often a run is above one of the others on the same task, of all pairs; a tie is
    half. One half says nothing; units do not matter."""
    shares = []
    for runs, other in zip(tasks, others, strict=True):
        gap = np.sign(runs[:, :, None] - other[:, None, :])
        shares.append((gap.mean((1, 2)) + 1) / 2)
    return np.mean(shares, 0)
