"""The file of a study: reading and checking."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentplan.config.loading import flatten, preset_folder, warn_about_renamed
from latentplan.config.renamed import present_names
from latentplan.config.yaml_text import read_mapping
from latentplan.study.sweep import expand
from latentplan.types import UserError, shown

SET_BY_STUDY = ("task", "ablation", "seed", "run_dir")
NAME = re.compile(r"[\w.=,+-]+", re.ASCII)  # of a variant, which is a part of the run folder's name


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
    # every ablation with each value of these keys: lists of values, or {low, high, log}
    sweep: dict[str, Any] = field(default_factory=dict)
    samples: int = 0  # of a random search in the sweep; 0: the whole grid
    sweep_seed: int = 0
    threshold: float = 0.0  # return for "frames to the level" of the report; 0: half of the best
    parallel: int = 1  # the number of runs at a time
    cpus: int = 0  # cores per run; 0: those of this machine, shared by the runs at a time
    gpus: float = 0.0  # GPUs per run on a cluster
    slurm: dict[str, str] = field(default_factory=dict)  # parameters of sbatch
    folder: str = ""  # the folder of the runs; empty: runs/study-<name of the file>


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
    for name, least in (("parallel", 1), ("cpus", 0), ("gpus", 0), ("samples", 0)):
        value = getattr(study, name)
        if not value >= least:
            raise UserError(f"{name} must be at least {least}, not {value}.")
    return _swept(study, path)


def _swept(study: Study, path: Path) -> Study:
    """``study`` with a variant for every ablation and point of its sweep."""
    if not study.sweep:
        return study
    try:
        points = expand(study.sweep, study.samples, study.sweep_seed)
    except ValueError as error:
        raise UserError(f"The sweep of {path} is not valid: {error}.") from error
    variants = {
        f"{ablation},{name}": study.variants.get(ablation, {"ablation": ablation}) | point
        for ablation in study.ablations
        for name, point in points.items()
    }
    return replace(study, ablations=list(variants), variants=variants)


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


def _axes(value: Any) -> dict[str, Any]:
    """The axes of a sweep by key. A mapping with ``low`` is a range, not a section of keys."""
    axes: dict[str, Any] = {}
    for key, axis in value.items():
        if isinstance(axis, dict) and "low" not in axis:
            axes |= {f"{key}.{name}": item for name, item in _axes(axis).items()}
        else:
            axes[key] = axis
    return axes


_READERS: dict[str, Callable[[Any], Any]] = {
    "tasks": _list,
    "ablations": _list,
    "variants": lambda value: {name: flatten(settings) for name, settings in value.items()},
    "seeds": lambda value: [int(seed) for seed in _list(value)],
    "settings": flatten,
    "per_task": lambda value: {task: flatten(settings) for task, settings in value.items()},
    "sweep": _axes,
    "samples": lambda value: int(_text(value)),
    "sweep_seed": lambda value: int(_text(value)),
    "threshold": lambda value: float(_text(value)),
    "parallel": lambda value: int(_text(value)),
    "cpus": lambda value: int(_text(value)),
    "gpus": lambda value: float(_text(value)),
    "slurm": lambda value: {key: _text(item) for key, item in value.items()},
    "folder": lambda value: os.path.expanduser(_text(value)),
}


def _use_present_names(study: Study, path: Path) -> None:
    """Rename the configuration keys of earlier versions in place, with one warning."""
    study.settings, changes = present_names(study.settings)
    study.sweep, more = present_names(study.sweep)
    changes += more
    for group in (study.per_task, study.variants):
        for name, settings in group.items():
            group[name], more = present_names(settings)
            changes += more
    if changes:
        warn_about_renamed(path, "; ".join(dict.fromkeys(changes)))


def _check_settings(study: Study, path: Path) -> None:
    """Raise a UserError if settings or variants do not fit the lists of the study."""
    for_all = [study.settings, study.sweep, *study.per_task.values()]
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
        if not NAME.fullmatch(name):
            raise UserError(
                f"The variant {shown(name)} of {path} must have a name of letters, digits and "
                "_ . = , + -, since it is a part of folder names."
            )
        if name not in study.ablations:
            raise UserError(f"The variant {name} of {path} is none of its ablations.")
        if name == "none" or (preset_folder() / "ablation" / f"{name}.yaml").is_file():
            raise UserError(
                f"The variant {name} of {path} has the name of an existing ablation: "
                "choose another name."
            )
