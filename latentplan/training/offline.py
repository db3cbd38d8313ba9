"""Training on recorded rows alone. No environment is stepped, except for evaluations and films."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentplan.config.schema import Config
from latentplan.config.tasks import has_environment
from latentplan.data.recording import Recording
from latentplan.data.replay import Replay
from latentplan.envs import Renderer, VectorEnv, make_train_env
from latentplan.types import EnvSpec, UserError

log = logging.getLogger("latentplan")
OBSERVATIONS = {"pixels": ("image",), "state": ("vector",), "both": ("image", "vector")}


class NoEnvironment(VectorEnv):
    """Takes the place of the training environments. It is closed, so it cannot be stepped."""

    def __init__(self, spec: EnvSpec) -> None:
        self.num_envs, self.spec = 1, spec
        self.episodes = np.zeros(1, np.int64)
        self.is_last = np.ones(1, bool)  # a checkpoint waits for the end of no episode
        self._envs, self._pending = [], None

    @property
    def faults(self) -> int:
        return 0


class Offline(NamedTuple):
    """What a run learns from that steps no environment."""

    spec: EnvSpec  # the observations and actions
    recording: Recording | None  # None for a run that goes on: its own replay has the rows


def prepare(config: Config, renderer: Renderer | None, saved: EnvSpec | None) -> Offline:
    """Open the recording of a new run, and compare it with the task.

    Args:
        config: the configuration of the run.
        renderer: the renderer of the task's environment.
        saved: the observations and actions of a run that goes on.

    Raises:
        UserError: as :func:`_open_recording`; the task's environment cannot be built, or has other
            observations or actions.
    """
    if saved is not None:
        return Offline(saved, None)
    recording = _open_recording(config)
    if has_environment(config.task):
        here = replace(config, env=replace(config.env, workers=False))
        with make_train_env(here, renderer) as env:
            spec = env.spec
    else:
        spec = _recorded_spec(recording.spec, config)
    recording.check(spec)
    return Offline(spec, recording)


def _open_recording(config: Config) -> Recording:
    """Open the recording that a new run learns from.

    Raises:
        UserError: the folder holds no recording, is the run's own replay, or has more rows than
            the replay.
    """
    folder = Path(config.train.offline)
    if folder.resolve() == (Path(config.run_dir) / "replay").resolve():
        raise UserError(f"train.offline={folder} would be overwritten: choose another run_dir.")
    recording = Recording(folder)
    if len(recording) > config.replay.capacity:
        raise UserError(
            f"The recording in {folder} has {len(recording)} rows: set "
            f"replay.capacity={len(recording)} or more."
        )
    return recording


def _recorded_spec(recorded: EnvSpec, config: Config) -> EnvSpec:
    """The observations that ``obs`` chooses from a recording, where there is no environment.

    Raises:
        UserError: the rows lack one of them.
    """
    names = OBSERVATIONS[config.obs]
    for name in names:
        if name not in recorded.obs:
            raise UserError(
                f"obs={config.obs} needs the observation {name}, and the recording in "
                f"{config.train.offline} has only {', '.join(recorded.obs)}."
            )
    obs = {name: recorded.obs[name] for name in names}
    return recorded._replace(obs=obs, repeat=config.env.repeat)


def fill(folder: Path, replay: Replay, recording: Recording, config: Config) -> None:
    """Copy the recording into the run's own replay, so that the run does not need it any more.

    Args:
        folder: that of the replay.
        replay: the new replay.
        recording: the rows.
        config: the configuration of the run.

    Raises:
        UserError: the recording has too few rows. The replay is closed and its folder removed.
    """
    copied = recording.copy_to(replay)
    window = config.train.context + config.train.length
    if not replay.ready(window):
        replay.close()
        shutil.rmtree(folder)
        raise UserError(
            f"The recording in {config.train.offline} has {copied.rows} rows that can be used, and "
            f"an update needs windows of {window} (train.context + train.length)."
        )
    log.info("offline: %s rows of %s episodes", f"{copied.rows:,}", f"{copied.episodes:,}")
