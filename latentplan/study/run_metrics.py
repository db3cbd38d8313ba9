"""Measurements of a study's runs that explain their returns.

Returns are noisy. These measurements vary less between seeds. The runs of one task are measured
together, because some measurements compare runs with each other.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from latentplan.config.loading import load_resolved
from latentplan.config.schema import Config
from latentplan.inspection.calibration import k_step_errors, rank_correlations
from latentplan.inspection.curves import read_metrics, report_path
from latentplan.runs import run_folder
from latentplan.runs.source import RunSource
from latentplan.study.matrix import Job
from latentplan.types import Timestep, UserError, join

log = logging.getLogger("latentplan")
REWARDED = 0.1  # fraction of a frame's largest reward above which a frame counts as rewarded
BINS = 4  # intervals per dimension of an observation; their product is a cell
CONTEXT, AHEAD = 8, 5  # observed rows, and decisions that the held-out error looks ahead
WINDOWS = 64  # per run
ENDING = "_run_metrics.csv"
EARLIER_ENDING = "_mechanisms.csv"  # in reports of earlier versions


class RunMetrics(NamedTuple):
    """Measurements of one run. None: the event did not happen, or the metric does not exist."""

    first_reward: int | None  # frames from the last random decision to the first rewarded one
    coverage: int | None  # cells of the observation space visited after the random decisions
    reward_error: float | None  # mean absolute error AHEAD decisions ahead, on runs of other seeds
    latent_error: float | None  # total variation distance, on the same rows
    reward_rank: float | None  # Spearman's rho of the uncertainty and the reward error
    latent_rank: float | None  # Spearman's rho of the uncertainty and the latent error
    explore_bonus: float | None  # fraction of the bonus in the spread of scores, in the last half
    imagine_bonus: float | None  # the same fraction for plans inside imagination
    training: float | None  # return of the training episodes, with exploration, in the last half
    update_seconds: float | None  # wall clock of the run per update of the agent


UNKNOWN = RunMetrics(*[None] * len(RunMetrics._fields))  # for a run that cannot be measured
# These do not depend on the other runs of the report.
INDEPENDENT = ("first_reward", "explore_bonus", "imagine_bonus", "training", "update_seconds")


def write_run_metrics(measured: Mapping[Job, RunMetrics], out: Path) -> None:
    """Write ``out``_run_metrics.csv, with a row per run."""
    with report_path(out, ENDING).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "ablation", "seed", *RunMetrics._fields))
        for job, metrics in measured.items():
            values = (round(x, 4) if isinstance(x, float) else x for x in metrics)
            writer.writerow((job.task, job.ablation, job.seed, *values))


def read_run_metrics(out: Path) -> dict[tuple[str, str, int], RunMetrics]:
    """Read the metrics of an earlier report, by task, ablation and seed.

    Metrics that depend on the other runs of that report (cells, errors, ranks) are None, because
    they cannot be compared with those of another report.

    Raises:
        UserError: the file is missing, or it is not a table of run metrics.
    """
    path = report_path(out, ENDING)
    earlier = report_path(out, EARLIER_ENDING)
    if not path.exists() and earlier.exists():
        path = earlier
    runs = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                # Reports of earlier versions lack the last of them.
                known: dict[str, Any] = {
                    name: float(row[name]) for name in INDEPENDENT if row.get(name)
                }
                run = row["task"], row["ablation"], int(row["seed"])
                runs[run] = UNKNOWN._replace(**known)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a table of run metrics: {error!r}.") from error
    return runs


# Errors of reward and latent state, and the rank correlation of the uncertainty with each.
HeldOut = tuple[float | None, float | None, float | None, float | None]


class _Experience(NamedTuple):
    """Data from the replay of one run."""

    first_reward: int | None
    points: np.ndarray  # (T, D), as from `points`
    windows: Timestep  # (B, T, ...), each within one episode


def measure(runs: Sequence[Path], seeds: Sequence[int]) -> list[RunMetrics]:
    """Measure the runs of one task. Cells and held-out rows are common to all of them.

    A run whose replay cannot be read, or no longer has its first rows, is ``UNKNOWN``, with a
    warning. A run whose checkpoint has another architecture has no errors and no ranks.

    Args:
        runs: run folders.
        seeds: the seed of each run. A run is tested on rows of runs with other seeds, or on all
            rows if all seeds are equal.

    Raises:
        UserError: a folder holds no run.
    """
    known = {}
    for run in runs:
        # The configuration file is enough, so the checkpoint is not read here.
        config = load_resolved(run / "config.yaml")
        try:
            known[run] = _experience(run, config)
        except UserError as error:
            log.warning("no metrics of %s: %s", run.name, error)
    cells = dict(zip(known, coverage([x.points for x in known.values()]), strict=True))
    measured = []
    for run, seed in zip(runs, seeds, strict=True):
        if run not in known:
            measured.append(UNKNOWN)
            continue
        others = [r for r, s in zip(runs, seeds, strict=True) if r in known and s != seed]
        rows = join([known[other].windows for other in others or known], np.concatenate)
        metrics = read_metrics(run)
        measured.append(
            RunMetrics(
                known[run].first_reward,
                cells[run],
                *_held_out(run, rows),
                _late(metrics, "train/plan/explore_bonus_share"),
                _late(metrics, "train/plan/imagine_bonus_share"),
                _late(metrics, "episode/score"),
                _seconds_per_update(metrics),
            )
        )
    return measured


def _experience(run: Path, config: Config) -> _Experience:
    with run_folder.open_replay(run) as replay:
        history = since(replay.history(), config.train.prefill)
        windows = replay.sample_within_episodes(WINDOWS, CONTEXT + AHEAD, np.random.default_rng(0))
    if not history.reward.size:
        raise UserError(f"{run} has made no decision yet that was not random.")
    return _Experience(first_reward(history, config.env.repeat), points(history.obs), windows)


def since(history: Timestep, decisions: int) -> Timestep:
    """The rows (N, T) after the given number of decisions, counted over all environments.

    The first decisions are random. They are the same in all ablations of a seed.
    """
    made = (~history.is_first).sum(0).cumsum()
    begin = int(np.searchsorted(made, decisions, side="right"))
    return history.map(lambda x: x[:, begin:])


def first_reward(history: Timestep, repeat: int) -> int | None:
    """Environment frames before the first rewarded decision, summed over all environments."""
    rewarded = (history.reward > REWARDED * repeat).any(0)
    if not rewarded.any():
        return None
    arrivals = (~history.is_first).sum(0).cumsum()  # A reset row costs no frames.
    return int((arrivals[rewarded.argmax()] - 1) * repeat)


def points(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    """{name: (N, T, ...)} -> (N T, D). An image becomes a gray thumbnail of 4 x 4 pixels."""
    flat = []
    for x in obs.values():
        n, t = x.shape[:2]
        if x.dtype != np.uint8:
            flat.append(x.reshape(n * t, -1))
            continue
        height, width = x.shape[2:4]
        blocks = x.reshape(n * t, 4, height // 4, 4, width // 4, -1)
        flat.append(blocks.mean((2, 4, 5), dtype=np.float32).reshape(n * t, 16))
    return np.concatenate(flat, 1)


def coverage(visited: Sequence[np.ndarray]) -> list[int]:
    """The number of distinct cells that each run visited.

    Every dimension has ``BINS`` intervals, over the range of the points of all runs.

    Args:
        visited: (T, D) points of each run.
    """
    if not visited:
        return []
    low = np.min([x.min(0) for x in visited], 0)
    high = np.max([x.max(0) for x in visited], 0)
    width = np.maximum(high - low, 1e-8) / BINS
    cells = (np.minimum((x - low) // width, BINS - 1).astype(np.int8) for x in visited)
    return [len(np.unique(x, axis=0)) for x in cells]


def _held_out(run: Path, rows: Timestep) -> HeldOut:
    """Measure the model of a run on rows of other runs."""
    if not len(rows.reward):
        return None, None, None, None  # No episode is as long as a window.
    try:
        # No environment is built, so its code need not be trusted.
        agent, *_ = run_folder.load_agent(RunSource(run, trust=True))
    except UserError as error:
        log.warning("no errors of %s: %s", run.name, error)
        return None, None, None, None
    torch.manual_seed(0)
    result = k_step_errors(agent, rows.to(agent.device), CONTEXT, decode=False)
    ranks = rank_correlations(result)
    reward, latent = (float(result.errors[x][:, -1].mean()) for x in ("reward", "latent"))
    return reward, latent, ranks["reward"][-1], ranks["latent"][-1]


def _late(metrics: Sequence[Mapping[str, float]], name: str) -> float | None:
    """The mean of a metric over the last half of the frames."""
    half = metrics[-1]["step"] / 2 if metrics else 0
    values = [x[name] for x in metrics if x["step"] > half and x.get(name) is not None]
    return float(np.mean(values)) if values else None


def _seconds_per_update(metrics: Sequence[Mapping[str, float]]) -> float | None:
    """The wall clock of a run, per update of its agent."""
    last = metrics[-1] if metrics else {}
    seconds, updates = last.get("time"), last.get("train/updates")
    return seconds / updates if seconds and updates else None
