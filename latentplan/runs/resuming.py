"""Going on with a run: which keys may change, and whether a configuration belongs to a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from latentplan.config.loading import flatten, load_resolved, parse_overrides
from latentplan.config.schema import Config
from latentplan.data.replay import Replay
from latentplan.envs import parse_task
from latentplan.runs import checkpoint, session_record, trust
from latentplan.runs.run_folder import checkpoint_path, saved_config, with_module
from latentplan.runs.source import RunSource
from latentplan.types import UserError

# Keys that may change when a run continues. All other keys identify the run.
CHANGEABLE = (
    *("steps", "run_dir", "device"),
    *("env.workers", "env.timeout", "env.max_faults", "env.module", "env.renderer"),
    *("train.minutes", "train.threads", "train.compile"),
)
CHANGEABLE_SECTIONS = ("eval.", "log.")


def check_resumable(folder: Path, config: Config) -> None:
    """Check that training with ``config`` does not destroy a run in ``folder``. Writes nothing.

    A run that stopped before its first checkpoint may start again from the beginning.

    Raises:
        UserError: the folder contains another run, or a run without its checkpoint or replay.
    """
    path = checkpoint_path(folder)
    saved = checkpoint.exists(path)
    if saved or (folder / "config.yaml").exists():
        check_same(folder, config)
    if not saved and session_record.read(folder)["saved"]:
        raise UserError(
            f"{folder} contains a run but its checkpoint is missing: put {path.name} back, or "
            "choose another run_dir."
        )
    if saved and not Replay.exists(folder / "replay"):
        raise UserError(
            f"{folder} contains a run but its replay is missing: put the folder replay back, or "
            "choose another run_dir."
        )


def identity(config: Config) -> dict[str, Any]:
    """The settings that identify a run, by dotted key. They may not change when it continues."""
    flat = flatten(asdict(config))
    # All spellings of a task are the same task, for example walker_walk and dmc:walker_walk.
    flat["task"] = ":".join(parse_task(flat["task"]))
    fixed = (k for k in flat if k not in CHANGEABLE and not k.startswith(CHANGEABLE_SECTIONS))
    return {key: flat[key] for key in fixed}


def check_same(folder: Path, config: Config) -> None:
    """Check that ``config`` describes the run in ``folder``.

    Raises:
        UserError: the configurations identify different runs. The message names the first key that
            differs.
    """
    recorded = identity(load_resolved(folder / "config.yaml"))
    for key, value in identity(config).items():
        if recorded[key] != value:
            raise UserError(
                f"{folder} contains a run with {key}={recorded[key]}, not {value}: "
                "choose another run_dir (for a study, another folder), or keep the key as it was."
            )


def config_to_resume(source: RunSource, overrides: Sequence[str] = ()) -> Config:
    """The configuration with which a run goes on.

    Args:
        source: the run. Its folder becomes ``run_dir``, since it may have moved.
        overrides: ``key=value`` settings. Only keys that may change are accepted.

    Raises:
        UserError: the folder contains no run, a key may not change or is unknown, or the
            environment's code is not trusted.
    """
    given = parse_overrides(overrides)
    for key in given:
        if key not in CHANGEABLE and not key.startswith(CHANGEABLE_SECTIONS):
            raise UserError(
                f"{key} cannot change when a run goes on. These keys can: "
                f"{', '.join((*CHANGEABLE, *(f'{x}*' for x in CHANGEABLE_SECTIONS)))}."
            )
    if "run_dir" in given:
        raise UserError("run_dir is the folder that is named, so it cannot be set besides.")
    config = replace(saved_config(source.folder, overrides), run_dir=str(source.folder))
    if source.module:
        config = with_module(config, source.module)
    if not source.trust:
        trust.check(config, source.folder, source.module or given.get("env.module", ""))
    return config
