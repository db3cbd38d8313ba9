"""How a session of training begins: everything that is decided before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from latentplan.config.schema import Config
from latentplan.envs import Renderer, pick_renderer
from latentplan.runs import checkpoint, run_folder
from latentplan.runtime.allocator import configure_malloc
from latentplan.runtime.device import pick_device


class Start(NamedTuple):
    """The decisions of a session. Nothing in it is decided again later."""

    folder: Path
    asked: Config  # as the user gave it; the run folder records this one
    config: Config  # with the precision and the render quality that the run began with
    device: torch.device
    renderer: Renderer | None  # None where no images are drawn
    saved: dict[str, Any] | None  # the checkpoint of a run that goes on


def resolve(config: Config) -> Start:
    """Decide how a session begins, and refuse one that cannot.

    Sets the threads and the memory allocator of this process. Writes nothing.

    Raises:
        UserError: the folder holds another run, or one whose checkpoint or replay is missing or
            damaged; there is no such device; no renderer works.
    """
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    configure_malloc()
    folder = Path(config.run_dir)
    run_folder.check_resumable(folder, config)
    effective = run_folder.with_recorded_choices(folder, config)
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # the memory that is logged and the name that is recorded
    path = run_folder.checkpoint_path(folder)
    saved = checkpoint.load(path) if path.exists() else None
    return Start(folder, config, effective, device, pick_renderer(effective), saved)
