"""Statistics of an ablation over all tasks, with confidence intervals (Agarwal et al. 2021).

A study has few runs, and their returns differ a lot, so a mean without an interval says little.
The intervals come from a stratified bootstrap (``scipy.stats.bootstrap``): runs are drawn with
replacement within every task of every ablation. The intervals are too narrow for few runs. With
three runs on each of four tasks and normal returns, the interval of a mean covers 86 % instead of
95 %. Nothing follows for tasks that are not in the study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import CensoredData, bootstrap, ecdf, norm, trim_mean

RESAMPLES = 10_000
CONFIDENCE = 95  # percent of the resamples lie in an interval
BEST = 1000.0  # the highest return of a task of the Control Suite
MOST_RATIO = 1000.0  # of the means of a task
POWER = 0.8  # the probability of seeing a difference that exists

Scores = Mapping[str, Mapping[str, Sequence[float]]]  # by task, then ablation: a score per run
Runs = NDArray[np.float64]  # (..., runs): the scores of one task, or (S, runs): resamples of them


class Estimate(NamedTuple):
    """A statistic and its interval."""

    value: float
    low: float
    high: float


class Aggregate(NamedTuple):
    """The statistics of one ablation over all tasks. The last two compare it with the baseline."""

    mean: Estimate  # mean of the means of the tasks
    median: Estimate  # median of the means of the tasks
    iqm: Estimate  # interquartile mean: the mean of the middle half of all runs
    gap: Estimate  # optimality gap: by which fraction of BEST a run falls short of it on average
    improvement: Estimate | None  # probability of improvement; None: it is the baseline
    ratio: Estimate | None  # as of `ratio`; None: it is the baseline, or has no ratio


def aggregate(scores: Scores, baseline: str) -> dict[str, Aggregate]:
    """The statistics of every ablation. Every task must have at least two runs of each.

    Args:
        scores: for every task the scores of the same ablations.
        baseline: the ablation that others are compared with.
    """
    names = list(next(iter(scores.values())))
    runs = {name: [np.asarray(group[name], float) for group in scores.values()] for name in names}
    result = {}
    for name, tasks in runs.items():
        own = [estimate(function, tasks) for function in (_mean, _median, _iqm, _gap)]
        both = [*tasks, *runs[baseline]]
        compared: list[Estimate | None] = [None, None]
        if name != baseline:
            compared = [estimate(_improvement, both), ratio(tasks, runs[baseline])]
        result[name] = Aggregate(*own, *compared)
    return result


def mean_of_runs(scores: Sequence[float]) -> Estimate:
    """The mean of the runs of one task and ablation, and its interval; one run has none."""
    runs = np.asarray(scores, float)
    if runs.size == 1:
        return Estimate(*runs.repeat(3).tolist())
    return estimate(_mean, [runs])


def ratio(tasks: Sequence[Runs], others: Sequence[Runs]) -> Estimate | None:
    """The ratio of two ablations' means: the geometric mean over tasks.

    It is the exponential of the mean log ratio over tasks, so tasks count equally whatever their
    returns are. The ratio of a task counts as ``MOST_RATIO`` at most, and as its inverse at least,
    since a resample may have runs without any return only. The result is None where a run has a
    negative score, or all runs of a task have none.

    Args:
        tasks: (runs) scores of every task.
        others: those of the baseline.
    """
    both = [*tasks, *others]
    if any(runs.min() < 0 or runs.mean() == 0 for runs in both):
        return None
    return Estimate(*np.exp(estimate(_log_ratio, both)).tolist())


def runs_needed(scores: Scores, gains: Sequence[float]) -> list[int] | None:
    """How many runs per task and ablation would show that a mean is higher by these fractions.

    The variance between the runs of a task, relative to its squared mean, is that of the study,
    averaged over tasks and ablations. A difference is shown if the 95 % interval of the mean log
    ratio over the tasks leaves out zero; a true one is shown with the probability ``POWER``. The
    normal approximation makes this a rough number.

    Returns:
        A number per gain; None if a mean is not positive.
    """
    groups = [np.asarray(x, float) for group in scores.values() for x in group.values()]
    if any(x.mean() <= 0 or x.size < 2 for x in groups):
        return None
    variance = np.mean([x.var(ddof=1) / x.mean() ** 2 for x in groups])
    distance = norm.ppf((1 + CONFIDENCE / 100) / 2) + norm.ppf(POWER)
    needed = [2 * variance * (distance / math.log1p(x)) ** 2 / len(scores) for x in gains]
    return [max(2, math.ceil(x)) for x in needed]


def median_frames(frames: Sequence[int], reached: Sequence[bool]) -> float | None:
    """The median number of frames to an event, where some runs end before it (Kaplan-Meier).

    Args:
        frames: of each run, to the event or to its end.
        reached: whether the event happened.

    Returns:
        None if fewer than half of the runs come to the event.
    """
    data = CensoredData.right_censored(frames, ~np.asarray(reached))
    survival = ecdf(data).sf
    passed = survival.quantiles[survival.probabilities <= 0.5]
    return float(passed[0]) if passed.size else None


def profile(tasks: Sequence[Runs], levels: Sequence[float]) -> list[Estimate]:
    """The performance profile: the fraction of runs with a score above each level.

    Args:
        tasks: (runs) scores of every task. Every task has the same weight.
    """

    def above(level: float) -> Statistic:
        return lambda *runs, axis: np.mean([(x > level).mean(axis) for x in runs], 0)

    return [estimate(above(level), tasks) for level in levels]


Statistic = Callable[..., NDArray]  # of the runs of every task, along ``axis``, the last


def estimate(statistic: Statistic, tasks: Sequence[Runs]) -> Estimate:
    """A statistic of the runs (at least two) of every task, and its interval."""
    interval = bootstrap(
        tuple(tasks),
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        confidence_level=CONFIDENCE / 100,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(statistic(*tasks, axis=-1)), *map(float, interval))


def _mean(*tasks: Runs, axis: int) -> NDArray:
    """Every task has the same weight, for any number of runs."""
    return np.mean([runs.mean(axis) for runs in tasks], 0)


def _median(*tasks: Runs, axis: int) -> NDArray:
    return np.median([runs.mean(axis) for runs in tasks], 0)


def _iqm(*tasks: Runs, axis: int) -> NDArray:
    """Every run has the same weight. With three runs or fewer in total, it is the mean."""
    return trim_mean(np.concatenate(tasks, axis), 0.25, axis=axis)


def _gap(*tasks: Runs, axis: int) -> NDArray:
    return np.mean([1 - np.minimum(runs / BEST, 1).mean(axis) for runs in tasks], 0)


def _log_ratio(*both: Runs, axis: int) -> NDArray:
    """The mean over tasks. The first half are the tasks, the second those of the baseline."""
    half = len(both) // 2
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.log(runs.mean(axis)) for runs in both]
        ratios = np.nan_to_num(np.subtract(logs[:half], logs[half:]), nan=0.0)  # none against none
    return np.clip(ratios, -math.log(MOST_RATIO), math.log(MOST_RATIO)).mean(0)


def _improvement(*both: Runs, axis: int) -> NDArray:
    """The probability that a run has a higher score than a run of the other ablation.

    It is the fraction of all pairs of runs on the same task; a tie counts one half. The value 0.5
    means no difference. The units of the scores do not matter.
    """
    half = len(both) // 2
    fractions = []
    for runs, other in zip(both[:half], both[half:], strict=True):
        gap = np.sign(runs[..., :, None] - other[..., None, :])
        fractions.append((gap.mean((-2, -1)) + 1) / 2)
    return np.mean(fractions, 0)
