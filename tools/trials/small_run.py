"""A run that takes seconds, and what it holds once it is restored."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from latentplan.config.loading import load
from latentplan.config.schema import Config
from latentplan.data.replay import Replay
from latentplan.deploy.loading import load as load_agent
from latentplan.runs import checkpoint
from latentplan.runs.resuming import config_to_resume
from latentplan.runs.source import RunSource
from latentplan.runtime import disk
from latentplan.training.loop import Trainer
from latentplan.training.session import train
from latentplan.training.start import resolve

EPISODE = 64  # frames of an episode of the dummy task: 16 decisions and the row of the reset
CAPACITY = 100  # rows; with its spare rows, the ring has 200 slots
WRAPPED = 15 * EPISODE  # frames after which the ring has overwritten its first rows
SETTINGS = (
    *("size=tiny", "device=cpu", "task=dummy:pixels", "obs=state", "env.workers=false"),
    *("env.repeat=4", "env.image_size=16", "world.deter=16", "world.depth=2", "world.bins=41"),
    *("behavior.bins=41", "behavior.horizon=3", "train.precision=float32", "train.compile=off"),
    *("train.threads=1", "train.batch=2", "train.length=8", "train.ratio=8", "train.prefill=20"),
    *(f"replay.capacity={CAPACITY}", "log.every=64", "log.inspect_every=0", "eval.every=0"),
    *("eval.episodes=1", "eval.video=false", "log.checkpoint_seconds=0"),
)


def config(folder: Path, *items: str) -> Config:
    """The configuration of a small run in ``folder``, with further ``key=value`` items."""
    return load([], [*SETTINGS, f"run_dir={folder}", *items])


def train_until(folder: Path, frames: int, *items: str) -> None:
    """Train a small run, or go on with it, until it has this many frames."""
    train(config(folder, f"steps={frames}", *items))


class Content(NamedTuple):
    """What a reader gets from a run folder. Two contents are equal if all their bits are."""

    parts: dict[str, str]  # the hash of each part
    rows: tuple[str, ...] = ()  # the hash of each row that can be sampled, oldest first


def open_for_training(folder: Path, frames: int = 0) -> Content:
    """Restore a run as ``latentplan resume`` does, train it on, and return what was restored.

    Args:
        folder: the run folder. Opening it changes its records.
        frames: frames to train further; 0: none.
    """
    saved = config_to_resume(RunSource(folder, trust=True))
    with disk.locked(folder):
        start = resolve(saved)
        if start.saved is not None and frames:
            steps = start.saved["frames"] + frames
            start = start._replace(config=replace(start.config, steps=steps))
        trainer = Trainer(start)
        try:
            content = _restored(trainer)
            if frames:
                trainer.run()
            return content
        finally:
            trainer.close()


def open_agent(folder: Path) -> Content:
    """Load the agent of a run as Python programs do."""
    loaded = load_agent(folder, trust=True)
    spec = loaded.spec.to_dict()
    settings = _without_folder(loaded.config)
    return Content(
        {"agent": digest(loaded.agent.state_dict()), "spec": digest(spec), "config": settings}
    )


def _restored(trainer: Trainer) -> Content:
    parts = {
        "agent": trainer.agent.state_dict(),
        "optimizer": trainer.agent.optimizer.state_dict(),
        "counters": [trainer.frames, trainer.decisions, trainer.updates],
        "episodes": [int(n) for n in trainer.env.episodes],
        "schedules": trainer.monitor.state_dict(),
        "ratio": trainer.ratio.state_dict(),
        "random": checkpoint.random_state(),
        "sampler": checkpoint.generator_state(trainer.rng),
        "position": trainer.replay.state_dict(),
    }
    settings = _without_folder(trainer.config)
    hashes = {name: digest(value) for name, value in parts.items()}
    return Content({**hashes, "config": settings}, _rows(trainer.replay))


def _without_folder(settings: Config) -> str:
    return digest({**asdict(settings), "run_dir": ""})


def _rows(replay: Replay) -> tuple[str, ...]:
    """The hashes of all rows that can be sampled, drawn as training draws them, oldest first."""
    if not replay.ready(1):
        return ()
    row, episode = replay.sample(len(replay), 1, _EveryRow(len(replay)))  # type: ignore[arg-type]
    fields = [*row.parts().values(), episode]
    return tuple(digest([x[index] for x in fields]) for index in range(len(episode)))


class _EveryRow:
    """Stands for a random generator, and draws every row of one environment once, in order."""

    def __init__(self, count: int) -> None:
        self._count = count

    def integers(self, low: int, high: int | None = None, size: Any = None) -> np.ndarray:
        numbers = np.arange(self._count).reshape(size)
        return numbers % low if high is None else low + numbers % (high - low)


def digest(value: Any) -> str:
    """A hash of nested plain values, arrays and tensors, over all their bits and types."""
    result = hashlib.sha256()
    for piece in _pieces(value):
        result.update(piece)
    return result.hexdigest()[:16]


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _pieces(item)
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, torch.Tensor | np.ndarray):
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        yield f"{array.dtype}{array.shape}".encode()
        yield np.ascontiguousarray(array).tobytes()
    else:
        yield repr(value).encode()


class Warnings(logging.Handler):
    """Collects the warnings of the package while it is used as a context manager."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> Warnings:
        logging.getLogger("latentplan").addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("latentplan").removeHandler(self)
