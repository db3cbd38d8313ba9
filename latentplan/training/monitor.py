"""Monitoring of a run: episodes, metrics, evaluations, films and progress.

Monitoring does not change the run, because evaluation and films have their own random generators.
"""

from __future__ import annotations

import contextlib
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
from tqdm.contrib.logging import logging_redirect_tqdm

from latentplan.agent import Agent
from latentplan.config.schema import Config, sink_names
from latentplan.data.replay import Replay
from latentplan.envs import TooManyFaultsError, VectorEnv, has_environment
from latentplan.envs.rendering import Renderer
from latentplan.envs.simulator import FRAME_SECONDS, Picture
from latentplan.evaluation.episodes import score
from latentplan.inspection.calibration import (
    CONTEXT,
    HORIZON,
    k_step_errors,
    rank_correlations,
    scalars,
    windows,
)
from latentplan.inspection.dream_against_reality import (
    make_dream_against_reality_film,
    make_film_env,
)
from latentplan.inspection.tensorboard_layout import set_up_tensorboard
from latentplan.inspection.visualizations import (
    DREAM_DECISIONS,
    FPS,
    REAL_DECISIONS,
    SEQUENCES,
    visualizations,
)
from latentplan.runs.console_log import FILE_ONLY
from latentplan.runs.logger import Logger
from latentplan.runs.sinks import Sinks
from latentplan.runs.stamp import stamp
from latentplan.runtime.clock import Every, Stopwatch, disk, memory
from latentplan.training.stopping import Stop
from latentplan.types import Timestep, join

log = logging.getLogger("latentplan")
CALIBRATION_WINDOWS = 10, 30  # smallest and largest number of windows that are evaluated
SEEN_WIDTH = 192  # pixels of a film of the agent's images
METRIC_NAMES = {"mean": "eval", "sample": "sample", "planner": "planner"}  # by way of acting
LABELS = {
    "mean": "evaluation",
    "sample": "evaluation of the sampled policy",
    "planner": "evaluation of the planner",
}

OnLog = Callable[[dict[str, float]], object]


class Monitor:
    """Collects metrics from the training loop, and evaluates, films and logs when that is due.

    Args:
        config: the configuration of the run.
        folder: the run folder.
        agent: the agent in training.
        replay: the replay that films take their rows from.
        renderer: the renderer of evaluation environments, or None if no images are drawn.
        stop: a request to stop, which interrupts evaluations and films.
        schedules: the result of :meth:`state_dict` in a checkpoint; None for a new run.
        frame: the environment frame at which the run continues.
        on_log: called with every row of metrics that is written.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        agent: Agent,
        replay: Replay,
        renderer: Renderer | None,
        stop: Stop,
        *,
        schedules: Mapping[str, Any] | None = None,
        frame: int = 0,
        on_log: OnLog | None = None,
    ):
        self.config, self.agent, self.replay, self.renderer = config, agent, replay, renderer
        sinks = Sinks(sink_names(config.log.sinks), folder, config)
        self.folder, self.logger = folder, Logger(folder, frame=frame, sinks=sinks)
        self.stopwatch = Stopwatch()
        self._stop, self._on_log = stop, on_log
        self._has_env = has_environment(config.task)
        self._schedules = {
            "log": Every(config.log.every),
            "eval": Every(config.eval.every),
            "film": Every(config.log.inspect_every),
        }
        for name, state in (schedules or {}).items():
            self._schedules[name].load_state_dict(state)
        if schedules is None:
            set_up_tensorboard(self.logger, config)
        self._faults = self._skipped = 0
        self._returns = np.zeros(config.env.num_envs)
        self._lengths = np.zeros(config.env.num_envs, dtype=int)
        self._last_row = (time.monotonic(), frame, 0)  # time, frames, updates at the last row
        self._messages = contextlib.ExitStack()
        self._bar = tqdm(
            total=config.steps,
            initial=frame,
            unit="frame",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        if not self._bar.disable:  # messages appear above the bar and do not break it
            self._messages.enter_context(logging_redirect_tqdm())

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedules, for the checkpoint."""
        return {name: schedule.state_dict() for name, schedule in self._schedules.items()}

    # --- calls of the training loop ---------------------------------------------------------

    def start(self, frames: int, updates: int) -> None:
        """Measure rates from now on. The loop calls this when it starts."""
        self._last_row = (time.monotonic(), frames, updates)

    def count(self, *, faults: int, skipped: int) -> None:
        """Note the faults of training environments and the skipped batches since the run began."""
        self._faults, self._skipped = faults, skipped

    def add_row(self, row: Timestep, frames: np.ndarray, is_last: np.ndarray) -> None:
        """Count a row of experience. An episode that a fault has cut gives no score.

        Args:
            row: (N) the row of N environments.
            frames: (N) the environment frames that it took; 0 for a reset.
            is_last: (N) whether the row is the last one of its episode.
        """
        self._returns = np.where(row.is_first, 0.0, self._returns + row.reward)
        self._lengths = np.where(row.is_first, 0, self._lengths + frames)
        for i in np.flatnonzero(is_last):
            self.logger.add(
                {"episode/score": self._returns[i], "episode/length": float(self._lengths[i])}
            )

    def add_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """Add metrics of an update or a plan to the next row."""
        self.logger.add(metrics)

    def report(self, frames: int, updates: int, *, last: bool = False) -> float | None:
        """Evaluate, film and log if that is due.

        Args:
            frames: environment frames so far.
            updates: updates so far.
            last: this is the last report of the session. It always evaluates and logs.

        Returns:
            The mean return of the mean action, if it was evaluated.

        Raises:
            UserError: the metrics or a film cannot be written.
            TooManyFaultsError: the environments of an evaluation had too many faults.
            StopInterrupt: a stop is requested before the evaluation and the films are complete.
        """
        self._bar.update(frames - self._bar.n)
        due = {name: schedule.overdue(frames) for name, schedule in self._schedules.items()}
        try:
            with self._stop.interruptible():
                evaluates = updates and self._has_env and (due["eval"] or last)
                score = self._evaluate(frames, last) if evaluates else None
                if updates and due["film"]:
                    self._inspect(frames)
        except TooManyFaultsError:
            # A run that goes on would else repeat this evaluation, and meet the same faults.
            self._done(frames)
            raise
        if due["log"] or last:
            self._write(frames, updates)
        # An evaluation that a request to stop has interrupted remains due.
        self._done(frames)
        return score

    def _done(self, frames: int) -> None:
        """Note that all that was due at this frame is done."""
        for schedule in self._schedules.values():
            schedule(frames)

    def close(self) -> None:
        """Close the progress bar and the log files."""
        self._bar.close()
        self._messages.close()
        self.logger.close()

    # --- reports ----------------------------------------------------------------------------

    def _write(self, frames: int, updates: int) -> None:
        """Write a row of metrics, and show progress."""
        last_time, last_frames, last_updates = self._last_row
        now = time.monotonic()
        self._last_row = (now, frames, updates)
        seconds = max(now - last_time, 1e-9)
        rates = {
            "fps/env": (frames - last_frames) / seconds,
            "fps/updates": (updates - last_updates) / seconds,
            **{f"fps/share_{k}": v for k, v in self.stopwatch.fractions().items()},
        }
        self.stopwatch.reset()
        counts = {
            "train/updates": updates,
            "train/skipped_batches": self._skipped,
            "replay/rows": len(self.replay),
            "env/faults": self._faults,
        }
        row = self.logger.write(frames, now={**rates, **counts, **memory(), **disk(self.folder)})
        if self._on_log is not None:
            self._on_log(row)
        progress = {
            "return": row.get("episode/score"),
            "eval": row.get("episode/eval_score"),
            "updates/s": row["fps/updates"],
        }
        text = ", ".join(f"{name} {x:.3g}" for name, x in progress.items() if x is not None)
        self._bar.set_postfix_str(text)
        # No time is estimated from the prefill, which is faster than learning, nor from the first
        # updates, which are slower because functions are compiled.
        if frames > last_frames and updates > last_updates > 0:
            seconds_left = max(0, self.config.steps - frames) / rates["fps/env"]
            text += f", {seconds_left / 60:.0f} min left"
        # The bar shows the same on a terminal.
        lines = log if self._bar.disable else FILE_ONLY
        lines.info("frame %d/%d: %s", frames, self.config.steps, text)

    def _evaluate(self, frames: int, last: bool) -> float:
        """Score the policy's mean and its samples, and the planner at the last evaluation.

        All act in the same evaluation episodes.

        Returns:
            The mean return of the policy's mean.
        """
        config = self.config
        with self.stopwatch.section("eval"):
            planning = last and config.plan.candidates > 1
            modes = ["mean", "sample"] + ["planner"] * planning
            means, faults = {}, 0
            rows: list[Timestep] = []
            filmed = ("mean", "planner") if config.eval.video else ()
            for mode, scores in score(
                self.agent,
                config,
                self.renderer,
                modes,
                config.eval.episodes,
                config.seed,
                watch={"mean": rows.append},
                cameras=dict.fromkeys(filmed, _as_seen) if self.agent.world.spec.images else {},
            ):
                means[mode], name = scores.mean, METRIC_NAMES[mode]
                faults += scores.faults
                self.logger.add(
                    {
                        f"episode/{name}_score": scores.mean,
                        f"episode/{name}_std": scores.std,
                        f"episode/{name}_length": float(np.mean(scores.lengths)),
                    }
                )
                log.info("%s at frame %d: %.1f", LABELS[mode], frames, scores.mean)
                if scores.film is not None:
                    film = _enlarged(np.stack(scores.film.frames))
                    self._show(f"episode/{name}_video", film, frames, scores.film.fps, mode)
                if mode == "mean":
                    self._calibrate(join(rows, np.stack))
                    rows.clear()
            self.logger.add({"env/eval_faults": float(faults)})
            if "planner" in means:
                gap = means["planner"] - means["mean"]
                self.logger.add({"episode/planner_gap": gap})
        return means["mean"]

    def _calibrate(self, rows: Timestep) -> None:
        """Log how well the uncertainty ranks the model's errors in evaluation episodes (T, N).

        Training never uses these episodes.
        """
        held_out = windows(rows, CONTEXT + HORIZON, CONTEXT)
        smallest, largest = CALIBRATION_WINDOWS
        count = len(held_out.reward)
        if count < smallest or self.config.world.uncertainty_members == 1:
            return  # There are too few windows to rank, or no disagreement.
        chosen = np.linspace(0, count - 1, min(largest, count)).astype(int)  # evenly spaced
        device = self.agent.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            batch = held_out.map(lambda x: x[chosen]).to(device)
            result = k_step_errors(self.agent, batch, CONTEXT, decode=False)
        self.logger.add(scalars(rank_correlations(result), None))

    def _inspect(self, frames: int) -> None:
        """Log films and a plan fan of replayed rows, and a comparison of a dream with reality."""
        config, agent = self.config, self.agent
        length = config.train.length
        if not self.replay.ready(length):
            return
        device = agent.device
        with (
            self.stopwatch.section("inspect"),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(frames)
            rng = np.random.default_rng(frames)
            batch = self.replay.sample_within_episodes(SEQUENCES, length, rng)
            if not len(batch.reward):  # all episodes are shorter than `length`
                return
            context = min(config.log.inspect_context, length - 1)
            for name, film in visualizations(agent, batch.to(device), context):
                self._show(f"imagination/{name}", film, frames, FPS)
            if not self._has_env:
                return
            env, draws = make_film_env(
                config, self.renderer, SEQUENCES, config.seed, beside_training=True
            )
            with env:
                film = make_dream_against_reality_film(
                    agent, env, REAL_DECISIONS, DREAM_DECISIONS, draws
                )
            self._show("imagination/dream_against_reality", film, frames, FPS)

    def _show(self, tag: str, film: np.ndarray, frames: int, fps: float, *more: str) -> None:
        """Log a film (T, H, W, 3) with the name of the run, the frame, and ``more`` texts on it."""
        named = stamp(film, self.folder.absolute().name, frames, *more)
        with self._stop.uninterrupted():
            self.logger.video(tag, named, frames, fps)


def _as_seen(env: VectorEnv, row: Timestep) -> Picture:
    """A camera that shows what the agent sees, which costs nothing to draw."""
    return Picture(row.obs[env.spec.images[0]][0].copy(), FRAME_SECONDS)


def _enlarged(film: np.ndarray) -> np.ndarray:
    """A film (T, h, w, 3) of small images at a whole multiple of their size.

    In TensorBoard the line of text above a small film would be larger than its images.
    """
    scale = max(1, SEEN_WIDTH // film.shape[2])
    return film.repeat(scale, 1).repeat(scale, 2)
