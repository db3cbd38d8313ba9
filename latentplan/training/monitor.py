"""What a run shows of itself: episodes, metrics, evaluations, films, progress.

Looking changes nothing: evaluation and films draw from generators of their own.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.data.replay import Replay
from latentplan.envs import make_eval_env
from latentplan.envs.rendering import Renderer
from latentplan.evaluation.evaluate import score
from latentplan.inspection.calibration import (
    CONTEXT,
    HORIZON,
    k_step,
    rank_correlations,
    scalars,
    windows,
)
from latentplan.inspection.dream_against_reality import show_reality
from latentplan.inspection.tensorboard_layout import present
from latentplan.inspection.visualizations import (
    BEGIN,
    DREAM,
    FPS,
    SEQUENCES,
    Exhibit,
    exhibits,
    of_film,
)
from latentplan.runs.logger import Logger
from latentplan.runtime.clock import Every, Stopwatch, disk, memory
from latentplan.types import Timestep

log = logging.getLogger("latentplan")
CALIBRATED = 10, 30  # windows of evaluation episodes: at least, at most
NAMES = {"mean": "eval", "planner": "planner"}  # of metrics, by mode
LABELS = {"mean": "evaluation", "planner": "evaluation of the planner"}


class Monitor:
    """Collects what the loop tells it and reports when that is due, on the axis of frames."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        agent: Agent,
        replay: Replay,
        renderer: Renderer | None,
        *,
        due: Mapping[str, Any] | None = None,
        frame: int = 0,
        on_log: Callable[[dict[str, float]], object] | None = None,
    ):
        self.config, self.agent, self.replay, self.renderer = config, agent, replay, renderer
        self.folder, self.logger = folder, Logger(folder, frame=frame)
        self.watch = Stopwatch()
        self._on_log = on_log
        self._due = {
            "log": Every(config.log.every),
            "eval": Every(config.eval.every),
            "film": Every(config.log.inspect_every),
        }
        for name, state in (due or {}).items():
            self._due[name].load_state_dict(state)
        if due is None:
            present(self.logger, config)
        self._returns = np.zeros(config.env.num_envs)
        self._lengths = np.zeros(config.env.num_envs, dtype=int)
        self._mark = (time.monotonic(), frame, 0)
        self._bar = tqdm(
            total=config.steps,
            initial=frame,
            unit="frame",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def state_dict(self) -> dict[str, Any]:
        return {name: every.state_dict() for name, every in self._due.items()}

    # --- what the loop tells ----------------------------------------------------------------

    def begin(self, frames: int, updates: int) -> None:
        """The loop starts now; rates are measured from here."""
        self._mark = (time.monotonic(), frames, updates)

    def row(self, row: Timestep, frames: np.ndarray, is_last: np.ndarray) -> None:
        """A row (N) of experience came in, after ``frames`` (N) frames."""
        self._returns = np.where(row.is_first, 0.0, self._returns + row.reward)
        self._lengths = np.where(row.is_first, 0, self._lengths + frames)
        for i in np.flatnonzero(is_last):
            self.logger.add(
                {"episode/score": self._returns[i], "episode/length": float(self._lengths[i])}
            )

    def update(self, metrics: Mapping[str, Tensor]) -> None:
        """The agent made an update, or a plan."""
        self.logger.add(metrics)

    def report(self, frames: int, updates: int, *, last: bool = False) -> None:
        """Evaluate, film and log where due; the ``last`` report of a session always has a score."""
        self._bar.update(frames - self._bar.n)
        due = {name: every(frames) for name, every in self._due.items()}
        if updates and (due["eval"] or last):
            self._evaluate(frames)
        if updates and due["film"]:
            self._inspect(frames)
        if due["log"] or last:
            self._write(frames, updates)

    def close(self) -> None:
        self._bar.close()
        self.logger.close()

    # --- what is shown ----------------------------------------------------------------------

    def _write(self, frames: int, updates: int) -> None:
        then, frames_then, updates_then = self._mark
        now = time.monotonic()
        self._mark = (now, frames, updates)
        seconds = max(now - then, 1e-9)
        rates = {
            "fps/env": (frames - frames_then) / seconds,
            "fps/updates": (updates - updates_then) / seconds,
            **{f"fps/share_{k}": v for k, v in self.watch.shares().items()},
        }
        self.watch.reset()
        counts = {"train/updates": updates, "replay/rows": len(self.replay)}
        line = self.logger.write(frames, now={**rates, **counts, **memory(), **disk(self.folder)})
        if self._on_log is not None:
            self._on_log(line)
        shown = {
            "return": line.get("episode/score"),
            "eval": line.get("episode/eval_score"),
            "updates/s": line["fps/updates"],
        }
        text = ", ".join(f"{k} {v:.3g}" for k, v in shown.items() if v is not None)
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            # Random decisions are quicker than learning, the first updates, being compiled, slower.
            if frames > frames_then and updates > updates_then > 0:
                left = (self.config.steps - frames) / rates["fps/env"]
                text += f", {left / 60:.0f} min left"
            log.info("frame %d/%d: %s", frames, self.config.steps, text)

    def _evaluate(self, frames: int) -> None:
        config = self.config
        with self.watch.section("eval"):
            modes = ["mean", "planner"] if config.plan.candidates > 1 else ["mean"]
            means = {}
            for mode, scores in score(
                self.agent, config, self.renderer, modes, config.eval.episodes, config.seed
            ):
                means[mode], name = scores.mean, NAMES[mode]
                self.logger.add(
                    {
                        f"episode/{name}_score": scores.mean,
                        f"episode/{name}_std": scores.std,
                        f"episode/{name}_length": float(np.mean(scores.lengths)),
                    }
                )
                log.info("%s at frame %d: %.1f", LABELS[mode], frames, scores.mean)
                film = scores.film(self.agent.world.spec)
                if film is not None and config.eval.video:
                    self.logger.video(f"episode/{name}_video", film, frames, fps=30)
                if mode == "mean":
                    self._calibrate(scores.rows)
            if "planner" in means:
                gap = means["planner"] - means["mean"]
                self.logger.add({"episode/planner_gap": gap})

    def _calibrate(self, rows: Timestep) -> None:
        """How well uncertainty ranks errors in evaluation episodes, which training never sees."""
        found = windows(rows, CONTEXT + HORIZON, CONTEXT)
        least, most = CALIBRATED
        count = len(found.reward)
        if count < least or self.config.world.uncertainty_members == 1:
            return  # nothing to be ranked
        few = np.linspace(0, count - 1, min(most, count)).astype(int)
        device = self.agent.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            batch = found.map(lambda x: x[few]).to(device)
            result = k_step(self.agent, batch, CONTEXT, decode=False)
        self.logger.add(scalars(rank_correlations(result), None))

    def _inspect(self, frames: int) -> None:
        """Films and a plan fan of replayed rows, and a dream held against reality."""
        config, agent = self.config, self.agent
        length = config.train.length
        if not self.replay.ready(length):
            return
        device = agent.device
        with (
            self.watch.section("inspect"),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(frames)
            rng = np.random.default_rng(frames)
            batch = self.replay.sample_within_episodes(SEQUENCES, length, rng)
            if not len(batch.reward):  # episodes are shorter than that
                return
            context = min(config.log.inspect_context, length - 1)
            for exhibit in exhibits(agent, batch.to(device), context):
                self._show(exhibit, frames)
            with make_eval_env(config, self.renderer, SEQUENCES, config.seed) as env:
                film = show_reality(agent, env, BEGIN, DREAM)
            self._show(of_film(agent, "dream_against_reality", film), frames)

    def _show(self, exhibit: Exhibit, frames: int) -> None:
        self.logger.video(f"imagination/{exhibit.name}", exhibit.frames, frames, FPS)
