"""Checkpoints that are kept beside the newest: the best evaluation's, and periodic ones.

They hold the weights of the agent, without what a run needs to go on::

    checkpoints/best.pt  checkpoints/frame-100000.pt
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentplan.agent import Agent
from latentplan.runs import checkpoint
from latentplan.types import UserError

BEST = "best"
_FOLDER = "checkpoints"


def path_of(folder: Path, name: str) -> Path:
    """The file of a kept checkpoint.

    Args:
        folder: the run folder.
        name: ``best``, or a number of environment frames.

    Raises:
        UserError: the name is another one, or there is no such checkpoint. The message names those
            that are there.
    """
    files = {_name(path): path for path in sorted((folder / _FOLDER).glob("*.pt"))}
    if name not in files:
        names = ", ".join(sorted(files, key=lambda x: (x == BEST, len(x), x))) or "none"
        raise UserError(f"{folder} has no checkpoint {name!r}; its kept checkpoints: {names}.")
    return files[name]


def _name(path: Path) -> str:
    """What a user calls the checkpoint of this file."""
    return path.stem.removeprefix("frame-")


class KeptCheckpoints:
    """Writes the kept checkpoints of a run.

    Args:
        folder: the run folder.
        every: frames between periodic checkpoints; 0: none.
        frames: frames of the run so far.
        best_score: the best score of an evaluation so far; None before the first.
    """

    def __init__(self, folder: Path, every: int, frames: int, best_score: float | None) -> None:
        self._folder, self._every, self._frames = folder / _FOLDER, every, frames
        self.best_score = best_score

    def report(self, agent: Agent, frames: int, score: float | None) -> None:
        """Keep the agent if it is the best so far, or if a periodic checkpoint is due.

        Args:
            agent: the agent in training.
            frames: frames of the run so far.
            score: the mean return of an evaluation at this frame, if there was one.

        Raises:
            UserError: a file cannot be written.
        """
        if score is not None and (self.best_score is None or score > self.best_score):
            self._save(BEST, agent, frames, score)
            self.best_score = score
        if self._every and frames // self._every > self._frames // self._every:
            self._save(f"frame-{frames}", agent, frames, score)
        self._frames = frames

    def _save(self, name: str, agent: Agent, frames: int, score: float | None) -> None:
        content: dict[str, Any] = {
            "frames": frames,
            "score": score,
            "spec": agent.world.spec.to_dict(),
            "agent": agent.state_dict(),
        }
        checkpoint.save(self._folder / f"{name}.pt", content, keep_former=False)
