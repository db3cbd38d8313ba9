"""The start of a training session: all decisions that come before anything is built."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from latentplan.config.schema import Config, sink_names
from latentplan.envs import Renderer, pick_renderer
from latentplan.runs import (
    checkpoint,
    initial_weights,
    payload,
    resuming,
    run_folder,
    sinks,
    weights,
)
from latentplan.runs.initial_weights import InitialWeights
from latentplan.runtime.allocator import configure_malloc
from latentplan.runtime.device import pick_device
from latentplan.training.offline import Offline, prepare
from latentplan.types import UserError


class Start(NamedTuple):
    """The decisions of a session. They are final."""

    folder: Path
    user_config: Config  # as the user gave it; the run folder records this one
    config: Config  # with the precision and the render quality of the run's first session
    device: torch.device
    renderer: Renderer | None  # None if no images are drawn
    saved: dict[str, Any] | None  # the checkpoint of a run that continues
    initial: InitialWeights | None = None  # the weights of another run that a new run begins with
    offline: Offline | None = None  # what a run learns from that steps no environment


def require_one_process() -> None:
    """Raise a UserError in a process that ``torchrun`` has started beside others.

    They would all train the same run, in the same folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        raise UserError(
            "latentplan train runs in one process: start it without torchrun. docs/scaling.md says "
            "what several processes can share."
        )


def resolve(config: Config) -> Start:
    """Decide the device, the renderer, the effective configuration and the state to resume from.

    Sets the threads and the memory allocator of this process. Writes nothing.

    Raises:
        UserError: the folder contains another run, or a run whose checkpoint or replay is missing
            or damaged; the checkpoint to begin from is missing or damaged; the recording to
            learn from is missing or damaged, or does not fit the task; the device does not exist;
            no renderer works; the package of a sink is not installed.
    """
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    configure_malloc()
    folder = Path(config.run_dir)
    resuming.check_resumable(folder, config)
    sinks.check_installed(sink_names(config.log.sinks))
    effective = run_folder.with_recorded_choices(folder, config)
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is not None:
        # Logged memory and the recorded device name are those of the current device.
        torch.cuda.set_device(device)
    path = run_folder.checkpoint_path(folder)
    saved = None
    if checkpoint.exists(path):
        saved = payload.read_training(checkpoint.load_newest(path), path, effective)
        weights.check_sizes(saved["spec"], effective, saved["agent"], path)
    initial = None
    if saved is None and config.train.init_from:
        initial = initial_weights.read(config.train.init_from)
    renderer, offline = pick_renderer(effective), None
    if config.train.offline:
        offline = prepare(effective, renderer, saved["spec"] if saved else None)
    return Start(folder, config, effective, device, renderer, saved, initial, offline)
