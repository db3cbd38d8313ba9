"""``latentplan imagine RUN``: films, stills and a latent map of an agent from its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.envs import pick_renderer
from latentplan.evaluation.episodes import run_episodes
from latentplan.inspection.calibration import windows
from latentplan.inspection.calibration_report import calibrate_agent
from latentplan.inspection.dream_against_reality import (
    make_dream_against_reality_film,
    make_film_env,
)
from latentplan.inspection.latent_map import latent_map
from latentplan.inspection.visualizations import (
    DREAM_DECISIONS,
    FPS,
    REAL_DECISIONS,
    SEQUENCES,
    Visualization,
    visualizations,
)
from latentplan.runs import run_folder
from latentplan.runs.logger import Logger
from latentplan.runs.source import RunSource
from latentplan.runs.stamp import stamp
from latentplan.runs.video import write_video
from latentplan.runtime.device import pick_device
from latentplan.types import Timestep, UserError, join

log = logging.getLogger("latentplan")
LENGTH = 24  # rows of a window
EPISODES = 2  # episodes that are shown, each in an environment of its own
CALIBRATION_EPISODES = 5


def imagine(
    run: str | Path,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    plan: Sequence[str] = (),
    device: str = "auto",
    module: str = "",
    trust: bool = False,
    checkpoint: str = "",
) -> dict[str, Any]:
    """Show how an agent predicts, imagines and plans in episodes that training never sees.

    The visualizations of :mod:`latentplan.inspection.visualizations`, the dream against reality and
    the latent map are written as PNG, MP4 (GIF without ffmpeg) and TensorBoard events. A
    calibration from ``CALIBRATION_EPISODES`` episodes is written to ``out/calibration``.

    Args:
        run: the run folder.
        out: the folder of the results; default RUN/imagine.
        seed: the seed of episodes and imagination.
        plan: as in :func:`latentplan.evaluation.evaluate.evaluate`.
        device: the device of the agent.
        module, trust, checkpoint: as in :func:`latentplan.evaluation.evaluate.evaluate`.

    Returns:
        Plain values, ready for JSON: ``run``, ``frames`` of training, ``files`` by name, and notes
        about visualizations that this run cannot have.

    Raises:
        UserError: the folder contains no run, the environment's code is not trusted, the checkpoint
            is damaged, no renderer works, or the seed is not valid.
    """
    folder = Path(run)
    source = RunSource(folder, module, trust, checkpoint)
    agent, config, _, payload = run_folder.load_agent(source, pick_device(device), plan)
    target = Path(out) if out else folder / "imagine"
    frame, files = payload["frames"], {}
    renderer = pick_renderer(config)
    env, draws = make_film_env(config, renderer, EPISODES, seed, beside_training=False)
    with env:
        torch.manual_seed(seed)
        played: list[Timestep] = []
        run_episodes(agent, env, EPISODES, watch=played.append)
        film = make_dream_against_reality_film(agent, env, REAL_DECISIONS, DREAM_DECISIONS, draws)
    length = min(LENGTH, len(played))
    rows = windows(join(played, np.stack), length, length)
    logger = Logger(target, frame=frame)
    for name, frames in _all_visualizations(agent, config, rows, film):
        frames = stamp(frames, folder.absolute().name, frame)
        path = logger.video(f"imagination/{name}", frames, frame, FPS)
        if len(frames) > 1:  # the logger wrote a GIF
            path = write_video(target / "videos" / f"{name}.mp4", frames, FPS)
        files[name] = str(path)
    states = latent_map(agent, rows.to(agent.device))
    logger.points("latents", states.features, states.columns, states.thumbnails, frame)
    logger.close()
    try:
        report = calibrate_agent(agent, config, payload, folder, target, CALIBRATION_EPISODES)
        files["calibration"] = report["plot"]
    except UserError as error:
        log.warning("no calibration: %s", error)
    result: dict[str, Any] = {"run": str(folder), "frames": frame, "files": files}
    if not agent.world.spec.images:
        result["note"] = (
            "This run learns from state vectors: the model predicts no images, and charts show the "
            "entries of the vector that vary most."
        )
    if config.plan.candidates == 1:
        result["planner"] = (
            "This run does not plan. With --plan candidates=4 the films show a planner."
        )
    return result


def _all_visualizations(
    agent: Agent, config: Config, rows: Timestep, film: np.ndarray
) -> Iterator[Visualization]:
    """All visualizations of windows (B, T) that are spread over the episodes.

    Args:
        film: the film of the dream against reality.
    """
    spread = np.linspace(0, len(rows.reward) - 1, min(SEQUENCES, len(rows.reward))).astype(int)
    batch = rows.map(lambda x: x[spread]).to(agent.device)
    context = min(config.log.inspect_context, rows.reward.shape[1] - 1)
    yield from visualizations(agent, batch, context)
    yield Visualization("dream_against_reality", film)
