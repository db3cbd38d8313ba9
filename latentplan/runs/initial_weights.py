"""The weights of another run that a new run begins with. That run is data: nothing is imported."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from latentplan.agent import Agent
from latentplan.runs import checkpoint, payload, run_folder, weights
from latentplan.types import UserError

log = logging.getLogger("latentplan")
MOST_SHOWN = 8  # layers that a message names


class InitialWeights(NamedTuple):
    """The weights of another run."""

    path: Path  # the checkpoint
    frames: int  # that it was trained for
    state: Mapping[str, Tensor]  # the state dictionary of its agent


def read(run: str) -> InitialWeights:
    """Read the weights of another run.

    Args:
        run: a run folder, for its newest checkpoint, or a checkpoint file.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    path = Path(run)
    if path.is_dir():
        path = run_folder.checkpoint_path(path)
        raw = checkpoint.load_newest(path)
    elif path.is_file():
        raw = checkpoint.load(path)
    else:
        raise UserError(f"train.init_from={run} is neither a run folder nor a checkpoint file.")
    return InitialWeights(path, *payload.read_weights(raw, path))


def apply(agent: Agent, initial: InitialWeights) -> None:
    """Put the weights that fit into a new agent. The log says which do not.

    Raises:
        UserError: nothing fits, or a weight is not finite. The agent is unchanged.
    """
    copied = weights.copy_fitting(agent, initial.state, initial.path)
    log.info(
        "%d of %d layers begin with the weights of %s, of frame %d",
        *(copied.layers, copied.layers + len(copied.fresh), initial.path, initial.frames),
    )
    if copied.fresh:
        shown = ", ".join(copied.fresh[:MOST_SHOWN])
        more = len(copied.fresh) - MOST_SHOWN
        log.info(
            "these layers do not fit and keep their fresh weights: %s%s",
            *(shown, f", and {more} more" if more > 0 else ""),
        )
