"""What a session does about losses and gradients that are not finite."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from latentplan.agent import Agent, NonFiniteLossError
from latentplan.runs import checkpoint, payload, run_folder, weights
from latentplan.types import Timestep, UserError

log = logging.getLogger("latentplan")
IN_A_ROW = 3  # failed updates after which the agent returns to a checkpoint


class Recovery:
    """Skips batches whose loss is not finite, and brings the agent back if that does not help.

    The update of such a batch has changed no weight. After ``IN_A_ROW`` of them the weights are
    suspected, and the agent returns to the newest checkpoint. If the same happens again before
    another checkpoint is written, it returns to the former one, and then the session ends. What the
    run has experienced stays, and its counters go on.

    Args:
        agent: the agent in training.
        folder: the run folder.

    Attributes:
        skipped: batches that were skipped since the run began.
        in_a_row: batches that were skipped since the last update.
    """

    def __init__(self, agent: Agent, folder: Path) -> None:
        self._agent, self._folder = agent, folder
        self.skipped = self.in_a_row = 0
        self._tried: list[Path] = []  # checkpoints, since one was written

    def updated(self) -> None:
        """Note that an update succeeded."""
        self.in_a_row = 0

    def saved(self) -> None:
        """Note that a checkpoint was written."""
        self._tried = []

    def skip(self, error: NonFiniteLossError, batch: Timestep, updates: int) -> None:
        """Skip a batch (B, T), whose loss or gradient is not finite.

        Raises:
            UserError: no checkpoint is left to return to. The message names the terms and the file
                that holds the batch.
        """
        self.skipped += 1
        self.in_a_row += 1
        log.warning("%s The batch is skipped.", error)
        if self.in_a_row < IN_A_ROW:
            return
        newest = run_folder.checkpoint_path(self._folder)
        candidates = (newest, checkpoint.former_path(newest))
        left = [path for path in candidates if path.exists() and path not in self._tried]
        if not left:
            path = self._dump(batch, updates)
            raise UserError(
                f"{error} This happened {IN_A_ROW} times in a row, and going back to a checkpoint "
                f"did not help. The batch is in {path}. The last good checkpoint stays."
            ) from error
        self._return_to(left[0])

    def _return_to(self, path: Path) -> None:
        self._tried.append(path)
        self.in_a_row = 0
        saved = payload.read_training(checkpoint.load(path), path, self._agent.config)
        weights.restore(self._agent, saved["agent"], path)
        weights.restore_optimizer(self._agent, saved["optimizer"], path)
        log.warning("The agent returns to %s, of frame %d.", path, saved["frames"])

    def _dump(self, batch: Timestep, updates: int) -> Path:
        """Write a batch to a file in the run folder. Returns its path."""
        path, batch = self._folder / f"nonfinite-{updates}.npz", batch.map(lambda x: x.cpu())
        np.savez_compressed(path, **batch.parts())
        return path
