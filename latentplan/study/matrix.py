"""The file of a study, and its runs: the product of tasks, ablations and seeds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from latentplan.config.loading import (
    flatten,
    load,
    preset_folder,
    to_override,
    warn_about_renamed,
)
from latentplan.config.renamed import present_names
from latentplan.config.yaml_text import read_mapping
from latentplan.runs import checkpoint, metrics_file, payload, resuming, run_folder
from latentplan.runs.metrics_file import Metrics
from latentplan.types import UserError, shown

SET_BY_STUDY = ("task", "ablation", "seed", "run_dir")


@dataclass
class Study:
    """The keys of a study file."""

    tasks: list[str] = field(default_factory=list)
    ablations: list[str] = field(default_factory=lambda: ["none"])
    # name: the settings of an ablation of this study; its key ablation names the file it builds on
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    settings: dict[str, Any] = field(default_factory=dict)  # "key.sub": value, for every run
    # task: the settings of its runs
    per_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    parallel: int = 1  # the number of runs at a time
    folder: str = ""  # the folder of the runs; empty: runs/study-<name of the file>


class Progress(NamedTuple):
    """The progress of one run."""

    frames: int  # environment frames
    score: float | None  # mean return of the last evaluation


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
        return _progress(self._metrics())

    def _metrics(self) -> Metrics:
        try:
            return metrics_file.read(self.folder / "metrics.jsonl")
        except OSError:
            return Metrics([], [], ())

    def done(self) -> bool:
        """Whether the run has all its frames, and a checkpoint of its last frame."""
        metrics = self._metrics()
        # Where a line is damaged, which may be the last one, the checkpoint alone decides.
        if _progress(metrics).frames < self.steps and not metrics.damaged:
            return False
        try:
            path = run_folder.checkpoint_path(self.folder)
            return payload.read_frames(checkpoint.load(path), path) >= self.steps
        except UserError:
            return False


def _progress(metrics: Metrics) -> Progress:
    scores = [x for row in metrics.rows if (x := row.get("episode/eval_score")) is not None]
    frames = metrics.rows[-1]["step"] if metrics.rows else 0
    return Progress(frames, scores[-1] if scores else None)


def read_study(path: Path) -> Study:
    """Read and check the file of a study. Names of earlier versions give one warning.

    Raises:
        UserError: the file cannot be read or is not YAML, a key is unknown, a value has the wrong
            type, or a variant has the name of an ablation.
    """
    study = _parsed(read_mapping(path, "study"), path)
    for name in ("tasks", "ablations", "seeds"):
        values = getattr(study, name)
        if not values:
            raise UserError(f"The study {path} names no {name}.")
        if len(set(values)) < len(values):
            raise UserError(f"The study {path} names one of its {name} twice.")
    _use_present_names(study, path)
    _check_settings(study, path)
    if study.parallel < 1:
        raise UserError(f"parallel must be at least 1, not {study.parallel}.")
    return study


def _parsed(tree: dict[str, Any], path: Path) -> Study:
    """A study from the texts of its file. A key without a value keeps its default."""
    values = {}
    for key, value in tree.items():
        if key not in _READERS:
            raise UserError(f"The study {path} is not valid: it cannot have the key {shown(key)}.")
        try:
            values[key] = _READERS[key](value) if value != "" else getattr(Study(), key)
        except (TypeError, ValueError, AttributeError) as error:  # a value of another type
            raise UserError(
                f"The study {path} is not valid: {key} cannot be {shown(value)}."
            ) from error
    return Study(**values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _list(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError
    return [_text(item) for item in value]


_READERS: dict[str, Callable[[Any], Any]] = {
    "tasks": _list,
    "ablations": _list,
    "variants": lambda value: {name: flatten(settings) for name, settings in value.items()},
    "seeds": lambda value: [int(seed) for seed in _list(value)],
    "settings": flatten,
    "per_task": lambda value: {task: flatten(settings) for task, settings in value.items()},
    "parallel": lambda value: int(_text(value)),
    "folder": lambda value: os.path.expanduser(_text(value)),
}


def _use_present_names(study: Study, path: Path) -> None:
    """Rename the configuration keys of earlier versions in place, with one warning."""
    study.settings, changes = present_names(study.settings)
    for group in (study.per_task, study.variants):
        for name, settings in group.items():
            group[name], more = present_names(settings)
            changes += more
    if changes:
        warn_about_renamed(path, "; ".join(dict.fromkeys(changes)))


def _check_settings(study: Study, path: Path) -> None:
    """Raise a UserError if settings or variants do not fit the lists of the study."""
    for_all = [study.settings, *study.per_task.values()]
    # A variant may build on an ablation.
    without = [{k: x for k, x in v.items() if k != "ablation"} for v in study.variants.values()]
    for settings in (*for_all, *without):
        for key in SET_BY_STUDY:
            if key in settings:
                raise UserError(f"{key} in the settings of {path} is set by the study itself.")
    for task in study.per_task:
        if task not in study.tasks:
            raise UserError(
                f"per_task of {path} has settings for {task}, which is none of its tasks."
            )
    for name in study.variants:
        if name not in study.ablations:
            raise UserError(f"The variant {name} of {path} is none of its ablations.")
        if name == "none" or (preset_folder() / "ablation" / f"{name}.yaml").is_file():
            raise UserError(
                f"The variant {name} of {path} has the name of an existing ablation: "
                "choose another name."
            )


def jobs(study: Study, path: Path) -> list[Job]:
    """All runs of a study. The seeds are the outermost loop, so that one seed of every ablation is
    complete early.

    Raises:
        UserError: a setting is not valid, or a folder already holds a run with other settings,
            which does not belong to the study.
    """
    folder = Path(study.folder or f"runs/study-{path.stem}")
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
    """A text table of the state and the last score of each run.

    Tasks and ablations are rows, seeds are columns.

    Args:
        status: states of runs by folder that the files of a run do not show, such as running.
    """
    seeds = sorted({job.seed for job in matrix})
    width = max(len(f"{job.task} {job.ablation}") for job in matrix)
    lines = [" " * width + "".join(f"{f's{seed}':>18}" for seed in seeds)]
    for task, ablation in dict.fromkeys((job.task, job.ablation) for job in matrix):
        cells = {job.seed: _cell(job, status) for job in matrix if job[:2] == (task, ablation)}
        line = f"{task} {ablation}".ljust(width)
        lines.append(line + "".join(f"{cells.get(seed, ''):>18}" for seed in seeds))
    return "\n".join(lines)


def _cell(job: Job, status: dict[Path, str]) -> str:
    frames, score = job.progress()
    done = job.done()
    # The files do not show whether another process is training the run now.
    state = status.get(job.folder) or ("done" if done else "" if frames else "waiting")
    percent = "" if state in ("done", "waiting") else f"{100 * frames // job.steps}%"
    return " ".join(filter(None, [state, percent, "" if score is None else f"{score:.0f}"]))
