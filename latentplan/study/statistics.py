"""Statistics of an ablation over all tasks, with confidence intervals (Agarwal et al. 2021).

A study has few runs, and their returns differ a lot, so a mean without an interval says little.
The intervals come from a stratified bootstrap: runs are drawn with replacement within every task
of every ablation. The intervals are too narrow for few runs. With three runs on each of four tasks
and normal returns, the interval of a mean covers 86 % instead of 95 %. Nothing follows for tasks
that are not in the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

RESAMPLES = 10_000
CONFIDENCE = 95  # percent of the resamples lie in an interval

Scores = Mapping[str, Mapping[str, Sequence[float]]]  # by task, then ablation: a score per run
Samples = Sequence[NDArray[np.float64]]  # per task (S, runs): S resamples, or S = 1 for the data


class Estimate(NamedTuple):
    """A statistic and its interval."""

    value: float
    low: float
    high: float


class Aggregate(NamedTuple):
    """The statistics of one ablation over all tasks."""

    mean: Estimate  # mean of the means of the tasks
    iqm: Estimate  # interquartile mean: the mean of the middle half of all runs
    improvement: Estimate | None  # probability of improvement over the baseline; None: is baseline


def aggregate(scores: Scores, baseline: str) -> dict[str, Aggregate]:
    """The statistics of every ablation over all tasks, and its comparison with the baseline.

    Args:
        scores: every task has the same ablations, and at least two runs of each.
        baseline: one of the ablations.
    """
    rng = np.random.default_rng(0)
    tasks = list(scores.values())
    runs, resampled = {}, {}
    for name in tasks[0]:
        runs[name] = [np.asarray(by_ablation[name], float)[None] for by_ablation in tasks]
        resampled[name] = [x[0, rng.integers(x.size, size=(RESAMPLES, x.size))] for x in runs[name]]
    result = {}
    for name in runs:
        improvement = None
        if name != baseline:
            improvement = _estimate(
                _improvement(runs[name], runs[baseline]),
                _improvement(resampled[name], resampled[baseline]),
            )
        mean = _estimate(_mean(runs[name]), _mean(resampled[name]))
        iqm = _estimate(_iqm(runs[name]), _iqm(resampled[name]))
        result[name] = Aggregate(mean, iqm, improvement)
    return result


def mean_of_runs(scores: Sequence[float]) -> Estimate:
    """The mean of the runs of one task and ablation, and its interval; one run has none."""
    runs = np.asarray(scores, float)
    drawn = runs[np.random.default_rng(0).integers(runs.size, size=(RESAMPLES, runs.size))]
    return _estimate(runs.mean(keepdims=True), drawn.mean(1))


def _estimate(value: NDArray, resampled: NDArray) -> Estimate:
    outside = (100 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [outside, 100 - outside])
    return Estimate(float(value[0]), float(low), float(high))


def _mean(tasks: Samples) -> NDArray:
    """(S,) The mean over tasks. Every task has the same weight, for any number of runs."""
    return np.mean([runs.mean(1) for runs in tasks], 0)


def _iqm(tasks: Samples) -> NDArray:
    """(S,) The interquartile mean. Every run has the same weight.

    With three runs or fewer in total, it is the mean.
    """
    return trim_mean(np.concatenate(tasks, 1), 0.25, axis=1)


def _improvement(tasks: Samples, others: Samples) -> NDArray:
    """(S,) The probability that a run has a higher score than a run of the other ablation.

    It is the fraction of all pairs of runs on the same task; a tie counts one half. The value 0.5
    means no difference. The units of the scores do not matter.
    """
    fractions = []
    for runs, other in zip(tasks, others, strict=True):
        gap = np.sign(runs[:, :, None] - other[:, None, :])
        fractions.append((gap.mean((1, 2)) + 1) / 2)
    return np.mean(fractions, 0)
