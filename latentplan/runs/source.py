"""What is read of a run: its folder, one of its checkpoints, and the code of its environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunSource:
    """The run that a command reads, and what the person says about it.

    Attributes:
        folder: the run folder.
        module: replaces ``env.module``, if the module has moved since training. The person names
            it, so it is trusted.
        trust: the environment's code may be imported wherever it comes from, as
            :mod:`latentplan.runs.trust` explains. Also for callers that import no environment.
        checkpoint: ``best`` or a number of frames, one of the kept checkpoints; empty: the newest.
    """

    folder: Path
    module: str = ""
    trust: bool = False
    checkpoint: str = ""


def as_source(run: RunSource | Path) -> RunSource:
    """A path stands for the newest checkpoint of a run."""
    return run if isinstance(run, RunSource) else RunSource(run)
