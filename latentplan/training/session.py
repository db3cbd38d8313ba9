"""A training session: from a configuration to a run that has ended or stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from latentplan.config.loading import as_config
from latentplan.config.schema import Config
from latentplan.runs.console_log import ConsoleLog
from latentplan.runtime import disk
from latentplan.training.loop import Trainer
from latentplan.training.monitor import OnLog
from latentplan.training.start import require_one_process, resolve
from latentplan.training.stopping import start_resource_tracker, stop_on_signal
from latentplan.types import UserError


def train(
    config: Config | Mapping[str, Any] | Sequence[str], *, on_log: OnLog | None = None
) -> Path:
    """Train a new run, or continue the run in ``config.run_dir``.

    Args:
        config: a configuration, keys and values (``{"task": "walker_walk", "env.repeat": 2}``), or
            the files and ``key=value`` items of the command line.
        on_log: called with every row of metrics that is written: ``step`` (environment frames),
            ``time`` (seconds), and the metrics by name.

    Returns:
        The run folder.

    Raises:
        UserError: the configuration is wrong, or the session cannot start or continue. The message
            says why. An existing run loses nothing.
    """
    return train_session(as_config(config), on_log=on_log).folder


class Session(NamedTuple):
    """The outcome of a training session."""

    folder: Path
    stopped_by: int  # number of the signal; 0: the session has all its frames or its minutes


def train_session(config: Config, *, on_log: OnLog | None = None) -> Session:
    """As :func:`train`, and tell whether a signal stopped the session before its end."""
    require_one_process()
    # The lock comes before anything is read: another session that is still saving would otherwise
    # lose what it saves.
    folder = Path(config.run_dir)
    with disk.locked(folder), ConsoleLog(folder) as console:
        start = resolve(config)
        if config.env.workers:
            start_resource_tracker()
        trainer = Trainer(start, on_log)
        console.begin()
        try:
            with stop_on_signal(trainer.stop):
                ended = trainer.run()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{start.device} has no memory left. Use a smaller train.batch, "
                "behavior.starts_fraction or plan.imagine_fraction, or another size, in another "
                "run_dir."
            ) from error
        finally:
            trainer.close()
    return Session(start.folder, 0 if ended else trainer.stop.number)
