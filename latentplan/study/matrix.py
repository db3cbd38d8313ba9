"""The runs of a study, the product of tasks, ablations and seeds, and their progress.

The progress comes from the small files of a run folder; no checkpoint is read.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentplan.config.loading import load, to_override
from latentplan.runs import checkpoint, metrics_file, payload, resuming, run_folder, session_record
from latentplan.study.study_file import Study
from latentplan.types import UserError

WIDEST = 6  # seeds in a table that has a column per seed
STATES = ("done", "running", "submitted", "stopped", "failed", "waiting", "")


class Progress(NamedTuple):
    """The progress of one run."""

    frames: int  # environment frames
    score: float | None  # mean return of the last evaluation
    damaged: bool  # whether a line of the metrics is damaged


class Job(NamedTuple):
    """One run of a study."""

    task: str
    ablation: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    steps: int

    def progress(self) -> Progress:
        """The progress of the run, from its metrics. A run without metrics has 0 frames."""
        path = self.folder / "metrics.jsonl"
        try:
            status = path.stat()
            return _progress(path, status.st_mtime_ns, status.st_size)
        except OSError:
            return Progress(0, None, False)

    def done(self) -> bool:
        """Whether the run has all its frames, and a checkpoint of its last frame."""
        progress = self.progress()
        # Where a line is damaged, which may be the last one, the checkpoint alone decides.
        if progress.frames < self.steps and not progress.damaged:
            return False
        path = run_folder.checkpoint_path(self.folder)
        try:
            saved = session_record.read(self.folder)["frames"]
            if saved is None:  # a run of an earlier version
                saved = payload.read_frames(checkpoint.load(path), path)
        except UserError:
            return False
        return path.is_file() and saved >= self.steps


@lru_cache(maxsize=10_000)  # a study asks often, and most files have not changed since
def _progress(path: Path, changed: int, size: int) -> Progress:
    """The progress of a run by its file of metrics, which changed at that time (ns)."""
    metrics = metrics_file.read(path)
    scores = [x for row in metrics.rows if (x := row.get("episode/eval_score")) is not None]
    frames = metrics.rows[-1]["step"] if metrics.rows else 0
    return Progress(frames, scores[-1] if scores else None, bool(metrics.damaged))


def folder_of(study: Study, path: Path) -> Path:
    """The folder of the runs of a study."""
    return Path(study.folder or f"runs/study-{path.stem}")


def jobs(study: Study, path: Path) -> list[Job]:
    """All runs of a study. The seeds are the outermost loop, so that one seed of every ablation is
    complete early.

    Raises:
        UserError: a setting is not valid, or a folder already holds a run with other settings,
            which does not belong to the study.
    """
    folder = folder_of(study, path)
    matrix = []
    for seed in study.seeds:
        for task in study.tasks:
            for ablation in study.ablations:
                run = folder / f"{task.replace(':', '-').replace('/', '-')}-{ablation}-s{seed}"
                settings = {"task": task, "seed": seed, **study.settings}
                settings |= study.per_task.get(task, {})
                settings |= study.variants.get(ablation, {"ablation": ablation})
                overrides = [to_override(key, value) for key, value in settings.items()]
                overrides.append(f"run_dir={run}")
                config = load([], overrides)
                if (run / "config.yaml").is_file():
                    resuming.check_same(run, config)
                matrix.append(Job(task, ablation, seed, run, tuple(overrides), config.steps))
    return matrix


def table(matrix: list[Job], status: dict[Path, str]) -> str:
    """A text table of the states and the last scores of the runs.

    Tasks and ablations are rows. Seeds are columns, or where there are many, states are, with the
    number of runs in each and their mean score.

    Args:
        status: states of runs by folder that the files of a run do not show, such as running.
    """
    rows: dict[str, list[Job]] = {}
    for job in matrix:
        rows.setdefault(f"{job.task} {job.ablation}", []).append(job)
    seeds = sorted({job.seed for job in matrix})
    width = max(map(len, rows))
    if len(seeds) > WIDEST:
        return "\n".join(
            f"{name.ljust(width)}  {_counts(row, status)}" for name, row in rows.items()
        )
    lines = [" " * width + "".join(f"{f's{seed}':>18}" for seed in seeds)]
    for name, row in rows.items():
        cells = {job.seed: _cell(job, status) for job in row}
        line = "".join(f"{cells.get(seed, ''):>18}" for seed in seeds)
        lines.append(name.ljust(width) + line)
    return "\n".join(lines)


def _state(job: Job, status: dict[Path, str]) -> str:
    """The state of a run; empty if it has begun, and its files show no more."""
    # The files do not show whether another process is training the run now.
    known = status.get(job.folder)
    return known or ("done" if job.done() else "" if job.progress().frames else "waiting")


def _cell(job: Job, status: dict[Path, str]) -> str:
    frames, score, _ = job.progress()
    state = _state(job, status)
    percent = "" if state in ("done", "waiting") else f"{100 * frames // job.steps}%"
    return " ".join(filter(None, [state, percent, "" if score is None else f"{score:.0f}"]))


def _counts(row: list[Job], status: dict[Path, str]) -> str:
    counts = Counter(_state(job, status) for job in row)
    texts = [f"{counts[name]} {name or 'begun'}" for name in STATES if counts[name]]
    scores = [x for job in row if (x := job.progress().score) is not None]
    return ", ".join(texts) + (f"; mean score {np.mean(scores):.0f}" if scores else "")
