"""Published returns of the DeepMind Control Suite from pixels, and where they may be compared.

``visual_dmc_scores.csv`` has the means over seeds at 100,000, 500,000 and 1,000,000 environment
frames. They were computed from the result files that its column ``source`` names, which the authors
of these methods published in their repositories: danijar/dreamerv2 and danijar/dreamerv3 (D. Hafner
and others), nicklashansen/tdmpc2 (N. Hansen and others) and facebookresearch/drqv2 (D. Yarats and
others). The column ``measure`` says which episodes were averaged. All of them are for action
repeat 2.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from latentplan.config.tasks import parse_task

FILE = Path(__file__).with_name("visual_dmc_scores.csv")
NAMES = {
    "dreamerv3": "DreamerV3",
    "dreamerv2": "DreamerV2",
    "tdmpc2_pixels": "TD-MPC2",
    "drqv2": "DrQ-v2",
    "curl": "CURL",
    "sac_pixels": "SAC",
    "ppo_pixels": "PPO",
}
PUBLISHED_REPEAT = 2  # environment frames per decision
LAST_EVALUATION = 980_000  # frames: some curves end there, and their values stand for 1,000,000


class Published(NamedTuple):
    """A published return."""

    method: str
    frames: int  # environment frames
    mean: float  # over the seeds
    seeds: int
    training: bool  # the episodes are those of training, else of an evaluation


@cache
def _by_task() -> dict[tuple[str, str], list[Published]]:
    """The published returns by suite and name of the task."""
    returns: dict[tuple[str, str], list[Published]] = {}
    with FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            frames = LAST_EVALUATION if row["clamped_to_980k"] == "1" else int(row["env_frames"])
            training = row["measure"].startswith("train")
            name, mean, seeds = NAMES[row["method"]], float(row["mean"]), int(row["n_seeds"])
            returns.setdefault(parse_task(row["task"]), []).append(
                Published(name, frames, mean, seeds, training)
            )
    return returns


def published(task: tuple[str, str]) -> dict[str, list[Published]]:
    """The published returns of a task by method, in the order of ``NAMES`` and of frames.

    Args:
        task: the suite and the name.
    """
    rows = sorted(_by_task().get(task, ()), key=lambda row: row.frames)
    by_method = {name: [row for row in rows if row.method == name] for name in NAMES.values()}
    return {name: rows for name, rows in by_method.items() if rows}


def why_not_comparable(task: tuple[str, str], observations: Iterable[str]) -> str | None:
    """The reason why runs cannot be compared with published returns; None if they can.

    Args:
        task: the suite and the name.
        observations: the value of ``obs`` of each run. It is enough that one of them fits.
    """
    if task not in _by_task():
        return "there are none of this task"
    kinds = sorted(set(observations))
    if "pixels" not in kinds:
        return f"they are of agents from pixels, and these runs have obs={' and '.join(kinds)}"
    return None
