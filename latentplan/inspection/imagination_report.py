"""``latentplan imagine RUN``: what an agent imagines, from its checkpoint, as files and events."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.envs import make_eval_env, pick_renderer
from latentplan.evaluation.evaluate import run_episodes
from latentplan.inspection.calibration import windows
from latentplan.inspection.calibration_report import calibrate_agent
from latentplan.inspection.dream_against_reality import show_reality
from latentplan.inspection.latent_map import latent_map
from latentplan.inspection.visualizations import (
    BEGIN,
    DREAM,
    FPS,
    SEQUENCES,
    Exhibit,
    exhibits,
    of_film,
)
from latentplan.runs import run_folder
from latentplan.runs.logger import Logger, write_video
from latentplan.runtime.device import pick_device
from latentplan.types import Timestep, UserError

log = logging.getLogger("latentplan")
LENGTH = 24  # decisions of a window
EPISODES = 2  # played at a time, in environments of their own
CALIBRATED = 5  # episodes


def imagine(
    run: str | Path,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    plan: Sequence[str] = (),
    device: str = "auto",
    module: str = "",
) -> dict[str, Any]:
    """Show an agent on episodes that training never sees; the result is plain values.

    Everything of ``inspection/exhibits.py``, a dream against reality and the latent map are written
    to ``out`` (default RUN/imagine) as PNG, MP4 (GIF without ffmpeg) and TensorBoard events; so is
    a calibration of few episodes (``calibration`` there).

    Args:
        seed: of episodes and imagination.
        plan, module: as in :func:`latentplan.evaluation.evaluate.evaluate`.

    Raises:
        UserError: no run there, a damaged checkpoint, no working renderer, no such seed.
    """
    folder = Path(run)
    chosen = pick_device(device)
    agent, config, _, saved = run_folder.load_agent(folder, chosen, plan, module=module)
    place = Path(out) if out else folder / "imagine"
    frame, files = saved["frames"], {}
    renderer = pick_renderer(config)
    with make_eval_env(config, renderer, EPISODES, seed) as env:
        torch.manual_seed(seed)
        played = run_episodes(agent, env, EPISODES).rows
        reality = show_reality(agent, env, BEGIN, DREAM)
    length = min(LENGTH, len(played.reward))
    rows = windows(played, length, length)
    logger = Logger(place, frame=frame)
    for exhibit in shown(agent, config, rows, reality):
        path = logger.video(f"imagination/{exhibit.name}", exhibit.frames, frame, FPS)
        if len(exhibit.frames) > 1:  # a GIF so far
            path = write_video(place / "videos" / f"{exhibit.name}.mp4", exhibit.frames, FPS)
        files[exhibit.name] = str(path)
    found = latent_map(agent, rows.to(agent.device))
    logger.points("latents", found.features, found.columns, found.thumbnails, frame)
    logger.close()
    try:
        files["calibration"] = calibrate_agent(agent, config, saved, folder, place, CALIBRATED)[
            "plot"
        ]
    except UserError as error:
        log.warning("no calibration: %s", error)
    result: dict[str, Any] = {"run": str(folder), "frames": frame, "files": files}
    if not agent.world.spec.images:
        result["note"] = "This run learns from state vectors: there are charts, but no pictures."
    if config.plan.candidates == 1:
        result["planner"] = "This run does not plan; --plan candidates=4 shows what it would do."
    return result


def shown(agent: Agent, config: Config, rows: Timestep, reality: np.ndarray) -> Iterator[Exhibit]:
    """The exhibits of windows spread over the episodes."""
    spread = np.linspace(0, len(rows.reward) - 1, min(SEQUENCES, len(rows.reward))).astype(int)
    batch = rows.map(lambda x: x[spread]).to(agent.device)
    yield from exhibits(agent, batch, min(config.log.inspect_context, rows.reward.shape[1] - 1))
    yield of_film(agent, "dream_against_reality", reality)
