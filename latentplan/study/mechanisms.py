"""What planning is supposed to change, besides returns: measured on the runs of one task together.

Returns are noisy; these vary less from seed to seed, and say why a return is what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from latentplan import run_folder
from latentplan.evaluate import to_tensors
from latentplan.inspection.calibration import k_step, rank_correlations
from latentplan.replay import Replay
from latentplan.study.curves import read_metrics
from latentplan.types import Timestep

REWARDED = 0.1  # of a frame's largest reward: what counts as having met the reward
BINS = 4  # per dimension of a cell
CONTEXT, AHEAD = 8, 5  # rows seen, and decisions predicted, by the held-out error
WINDOWS = 64  # per run


class Mechanisms(NamedTuple):
    """Of one run. None where it was not met, or does not exist."""

    first_reward: int | None  # environment frames before the first rewarded decision
    coverage: int  # cells of the observation space visited in training
    reward_error: float | None  # mean absolute, AHEAD decisions ahead, on rows of other seeds' runs
    latent_error: float | None  # total variation there
    reward_rank: float | None  # Spearman's rho of the uncertainty with that reward error
    latent_rank: float | None
    explore_bonus: float | None  # share of the bonus in the spread of scores, mean over training
    imagine_bonus: float | None


def measure(runs: Sequence[Path], seeds: Sequence[int]) -> list[Mechanisms]:
    """Mechanisms of the runs of one task; cells and held-out rows are common to all of them.

    Args:
        runs: folders. seeds: of each run; a run is tested on rows of runs of *other* seeds, or on
            all rows where there are none.

    Raises:
        UserError: a folder holds no run, or it is damaged.
    """
    histories, windows, configs = [], [], []
    for run in runs:
        with run_folder.open_replay(run) as replay:
            histories.append(replay.history())
            windows.append(_windows(replay))
        configs.append(run_folder.load(run)[0])
    visited = coverage([history.obs for history in histories])
    measured = []
    for i, run in enumerate(runs):
        others = [w for w, seed in zip(windows, seeds, strict=True) if seed != seeds[i]]
        metrics = read_metrics(run)
        measured.append(
            Mechanisms(
                first_reward(histories[i], configs[i].env.repeat),
                visited[i],
                *_held_out(run, _join(others or windows)),
                *(
                    _mean(metrics, f"train/plan/{who}_bonus_share")
                    for who in ("explore", "imagine")
                ),
            )
        )
    return measured


def first_reward(history: Timestep, repeat: int) -> int | None:
    """Environment frames, over all environments, before the first rewarded decision."""
    rewarded = (history.reward > REWARDED * repeat).any(0)
    if not rewarded.any():
        return None
    arrivals = (~history.is_first).sum(0).cumsum()  # a reset row cost no frames
    return int((arrivals[rewarded.argmax()] - 1) * repeat)


def coverage(observations: Sequence[Mapping[str, np.ndarray]]) -> list[int]:
    """Distinct cells that each run visited: BINS per dimension, over the range that any run saw.

    Args:
        observations: of each run, {name: (N, T, ...)}; of pictures, a 4 x 4 grey thumbnail counts.
    """
    points = [np.concatenate([_points(x) for x in obs.values()], 1) for obs in observations]
    low = np.min([x.min(0) for x in points], 0)
    high = np.max([x.max(0) for x in points], 0)
    width = np.maximum(high - low, 1e-8) / BINS
    cells = [np.minimum((x - low) // width, BINS - 1).astype(np.int8) for x in points]
    return [len(np.unique(x, axis=0)) for x in cells]


def _points(x: np.ndarray) -> np.ndarray:
    """(N, T, ...) -> (N T, D)."""
    if x.dtype != np.uint8:
        return x.reshape(x.shape[0] * x.shape[1], -1)
    n, t, height, width = x.shape[:4]
    blocks = x.reshape(n * t, 4, height // 4, 4, width // 4, -1)
    return blocks.mean((2, 4, 5), dtype=np.float32).reshape(n * t, 16)


def _windows(replay: Replay) -> Timestep:
    """WINDOWS rows (B, CONTEXT + AHEAD), each window within one episode."""
    rows, _ = replay.sample(4 * WINDOWS, CONTEXT + AHEAD, np.random.default_rng(0))
    keep = np.flatnonzero(~rows.is_first[:, 1:].any(1))[:WINDOWS]
    return Timestep({k: x[keep] for k, x in rows.obs.items()}, *(x[keep] for x in rows[1:]))


def _join(parts: Sequence[Timestep]) -> Timestep:
    obs = {k: np.concatenate([x.obs[k] for x in parts]) for k in parts[0].obs}
    return Timestep(obs, *(np.concatenate(x) for x in zip(*(p[1:] for p in parts), strict=True)))


def _held_out(run: Path, rows: Timestep) -> tuple[float | None, ...]:
    """Errors of reward and latent, and the uncertainty's rank correlation with them."""
    if not len(rows.reward):
        return (None,) * 4  # no episode lasts as long as a window
    agent, *_ = run_folder.load_agent(run)
    torch.manual_seed(0)
    result = k_step(agent, to_tensors(rows, agent.device), CONTEXT)
    ranks = rank_correlations(result)
    names = ("reward", "latent")
    errors = (float(result.errors[name][:, -1].mean()) for name in names)
    return *errors, *(ranks[name][-1] for name in names)


def _mean(metrics: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [row[name] for row in metrics if row.get(name) is not None]
    return float(np.mean(values)) if values else None
