"""Learning curves of run folders: reading, and grouping by settings.

Only ``config.yaml`` and ``metrics.jsonl`` are read, so no code of a run folder is run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentplan.config.schema import Config
from latentplan.config.tasks import parse_task
from latentplan.inspection.curves import read_metrics
from latentplan.runs.resuming import identity
from latentplan.runs.run_folder import saved_config
from latentplan.types import UserError

METRICS = {  # short names of the returns in metrics.jsonl
    "train": "episode/score",
    "eval": "episode/eval_score",
    "sample": "episode/sample_score",
    "planner": "episode/planner_score",
}
NAMING = ("ablation", "obs", "size")  # settings that name a group before others do
MOST_KEYS = 3  # in a label, besides those of NAMING


class Curve(NamedTuple):
    """A metric of one run."""

    frames: NDArray[np.int64]  # (T,) environment frames, increasing
    values: NDArray[np.float64]  # (T,) finite


class Run(NamedTuple):
    """A run folder."""

    folder: Path
    config: Config
    rows: list[dict[str, Any]]  # of metrics.jsonl

    @property
    def task(self) -> tuple[str, str]:
        """The suite and the name of the task."""
        return parse_task(self.config.task)

    def curve(self, metric: str) -> Curve:
        """A metric by its full name. Rows without a finite value are left out."""
        # A frame can have two rows where a session ended, and the later one replaces the earlier.
        points = {row["step"]: row[metric] for row in self.rows if row.get(metric) is not None}
        frames = sorted(points)
        return Curve(np.array(frames, np.int64), np.array([points[x] for x in frames], float))


Groups = dict[str, dict[str, list[Run]]]  # by task (outside dm_control with suite), then by label


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders. A folder that is named twice is read once.

    Raises:
        UserError: a folder holds no run, or one of its files cannot be read.
    """
    different: dict[Path, Path] = {}
    for folder in folders:
        different.setdefault(folder.resolve(), folder)
    return [Run(x, saved_config(x), read_metrics(x)) for x in different.values()]


def unknown_metric(runs: Sequence[Run], metric: str) -> UserError:
    """The error that no run has a metric, with the nearest names."""
    known = {name for run in runs for row in run.rows for name in row} - {"step"}
    near = difflib.get_close_matches(metric, sorted(known), 3, 0.5)
    hint = f" Similar names: {', '.join(near)}." if near else ""
    return UserError(f"No run has a value of {metric}.{hint}")


def group(runs: Iterable[Run]) -> Groups:
    """Group runs whose settings differ only in the seed, or in keys that may change on resuming.

    A label has the settings in ``NAMING`` that differ between the runs. Where these do not tell two
    groups of a task apart, it also has the first keys that do.
    """
    runs = list(runs)
    settings = {run.folder: _settings(run) for run in runs}
    naming = [key for key in NAMING if len({x[key] for x in settings.values()}) > 1]
    groups: Groups = {}
    for task in dict.fromkeys(run.task for run in runs):
        of_task = [run for run in runs if run.task == task]
        labels = groups.setdefault(task[1] if task[0] == "dmc" else ":".join(task), {})
        for run in of_task:
            own = settings[run.folder]
            alike = [
                settings[other.folder]
                for other in of_task
                if all(settings[other.folder][key] == own[key] for key in naming)
            ]
            labels.setdefault(_label(own, naming, alike), []).append(run)
    return groups


def _settings(run: Run) -> dict[str, Any]:
    """The settings that identify a run, except for its seed."""
    return {key: value for key, value in identity(run.config).items() if key != "seed"}


def _label(
    own: Mapping[str, Any], naming: Sequence[str], alike: Sequence[Mapping[str, Any]]
) -> str:
    """A label for the settings ``own``, which sets them apart from all other settings ``alike``."""
    names = [own[key] for key in naming] or [own["ablation"]]
    differing = [key for key in own if any(other[key] != own[key] for other in alike)]
    texts = [f"{key}={own[key]}" for key in differing[:MOST_KEYS]]
    names = ["no ablation" if name == "none" else name for name in names]
    return ", ".join([*names, *texts])
