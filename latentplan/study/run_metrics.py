"""What planning is supposed to change, besides returns: measured on the runs of one task together.

Returns are noisy; these vary less from seed to seed, and say why a return is what it is.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from latentplan.config.loading import load_resolved
from latentplan.config.schema import Config
from latentplan.inspection.calibration import k_step, rank_correlations
from latentplan.inspection.curves import file_of, read_metrics
from latentplan.runs import run_folder
from latentplan.study.matrix import Job
from latentplan.types import Timestep, UserError, join

log = logging.getLogger("latentplan")
REWARDED = 0.1  # of a frame's largest reward: what counts as having met the reward
BINS = 4  # per dimension of a cell
CONTEXT, AHEAD = 8, 5  # rows seen, and decisions predicted, by the held-out error
WINDOWS = 64  # per run


class Mechanisms(NamedTuple):
    """Of one run. None where it was not met, or does not exist."""

    first_reward: int | None  # frames from the last random decision to the first rewarded one
    coverage: int | None  # cells of the observation space visited since
    reward_error: float | None  # mean absolute, AHEAD decisions ahead, on rows of other seeds' runs
    latent_error: float | None  # total variation there
    reward_rank: float | None  # Spearman's rho of the uncertainty with that reward error
    latent_rank: float | None
    explore_bonus: float | None  # share of the bonus in the spread of scores, last half of training
    imagine_bonus: float | None
    training: float | None  # return of training's own episodes, exploration included, there too


UNKNOWN = Mechanisms(*[None] * len(Mechanisms._fields))  # of a run that cannot be measured
ALONE = ("first_reward", "explore_bonus", "imagine_bonus", "training")  # the rest compare runs


def write_mechanisms(measured: Mapping[Job, Mechanisms], out: Path) -> None:
    """``out``_mechanisms.csv, with a row per run."""
    with file_of(out, "_mechanisms.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "ablation", "seed", *Mechanisms._fields))
        for job, found in measured.items():
            values = (round(x, 4) if isinstance(x, float) else x for x in found)
            writer.writerow((job.task, job.ablation, job.seed, *values))


def read_mechanisms(out: Path) -> dict[tuple[str, str, int], Mechanisms]:
    """By task, ablation and seed: what was written of each run for itself. What was measured
    against the other runs of that report (cells, errors, ranks) does not compare with others: None.

    Raises:
        UserError: the file is missing, or is something else.
    """
    path, found = file_of(out, "_mechanisms.csv"), {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                known = {name: float(row[name]) for name in ALONE if row[name]}
                run = row["task"], row["ablation"], int(row["seed"])
                found[run] = Mechanisms(**{name: known.get(name) for name in Mechanisms._fields})
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a report's mechanisms: {error!r}.") from error
    return found


class _Experience(NamedTuple):
    """What is read from the replay of one run."""

    first_reward: int | None
    points: np.ndarray  # (T, D), as of `points`
    windows: Timestep  # (B, T, ...), each of one episode


def measure(runs: Sequence[Path], seeds: Sequence[int]) -> list[Mechanisms]:
    """Mechanisms of the runs of one task; cells and held-out rows are common to all of them. A run
    whose replay cannot be read, or has forgotten its first rows, is UNKNOWN, with a warning; one
    whose checkpoint is of another architecture (an earlier commit's) has no errors and ranks.

    Args:
        runs: folders. seeds: of each run; a run is tested on rows of runs of *other* seeds, or on
            all rows where there are none.

    Raises:
        UserError: a folder holds no run.
    """
    known = {}
    for run in runs:
        config = load_resolved(run / "config.yaml")  # and not the checkpoint once more
        try:
            known[run] = _experience(run, config)
        except UserError as error:
            log.warning("no mechanisms of %s: %s", run.name, error)
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
            Mechanisms(
                known[run].first_reward,
                cells[run],
                *_held_out(run, rows),
                _late(metrics, "train/plan/explore_bonus_share"),
                _late(metrics, "train/plan/imagine_bonus_share"),
                _late(metrics, "episode/score"),
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
    """Rows (N, T) after so many decisions of all environments: the random ones are the same in all
    ablations of a seed."""
    made = (~history.is_first).sum(0).cumsum()
    begin = int(np.searchsorted(made, decisions, side="right"))
    return history.map(lambda x: x[:, begin:])


def first_reward(history: Timestep, repeat: int) -> int | None:
    """Environment frames, over all environments, before the first rewarded decision."""
    rewarded = (history.reward > REWARDED * repeat).any(0)
    if not rewarded.any():
        return None
    arrivals = (~history.is_first).sum(0).cumsum()  # a reset row cost no frames
    return int((arrivals[rewarded.argmax()] - 1) * repeat)


def points(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    """{name: (N, T, ...)} -> (N T, D); of pictures, a 4 x 4 grey thumbnail."""
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
    """Distinct cells that each run visited: BINS per dimension, over the range that any run saw.

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


def _held_out(run: Path, rows: Timestep) -> tuple[float | None, ...]:
    """Errors of reward and latent, and the uncertainty's rank correlation with them."""
    if not len(rows.reward):
        return (None,) * 4  # no episode lasts as long as a window
    try:
        agent, *_ = run_folder.load_agent(run)
    except UserError as error:
        log.warning("no errors of %s: %s", run.name, error)
        return (None,) * 4
    torch.manual_seed(0)
    result = k_step(agent, rows.to(agent.device), CONTEXT, decode=False)
    ranks = rank_correlations(result)
    names = ("reward", "latent")
    errors = (float(result.errors[name][:, -1].mean()) for name in names)
    return *errors, *(ranks[name][-1] for name in names)


def _late(metrics: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Mean of a metric over the last half of the frames."""
    half = metrics[-1]["step"] / 2 if metrics else 0
    values = [x[name] for x in metrics if x["step"] > half and x.get(name) is not None]
    return float(np.mean(values)) if values else None
