"""The training loop: collect experience, learn from the replay, evaluate, log and save.

Environment frames are the time axis of all schedules and logs, except for checkpoints, which are
due by seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentplan.agent import NonFiniteLossError
from latentplan.config.loading import as_config
from latentplan.config.schema import Config
from latentplan.data.batches import BatchSampler
from latentplan.data.replay import Replay
from latentplan.envs import Renderer, StepInterruptedError, make_train_env
from latentplan.runs import checkpoint, run_folder
from latentplan.runs.provenance import describe
from latentplan.runtime.clock import Every, Ratio
from latentplan.runtime.disk import gigabytes
from latentplan.training.compiling import is_compiler_failure, make_agent
from latentplan.training.monitor import Monitor, OnLog
from latentplan.training.start import Start, resolve
from latentplan.training.stopping import Stop, start_resource_tracker, stop_on_signal
from latentplan.types import Latent, Timestep, UserError

log = logging.getLogger("latentplan")
FIRST_CHECKPOINT_SECONDS = 30.0
PATIENCE_SECONDS = 25.0  # a due checkpoint waits this long for the end of an episode


def train(
    config: Config | Mapping[str, Any] | Sequence[str], *, on_log: OnLog | None = None
) -> Path:
    """Train a new run, or continue the run in ``config.run_dir``.

    Args:
        config: a configuration, keys and values (``{"task": "walker_walk", "env.repeat": 2}``), or
            the files and ``key=value`` items of the command line.
        on_log: called with every row of metrics that is written: ``step`` (environment frames),
            ``time`` (seconds), and the metrics by name.

    Returns:
        The run folder.

    Raises:
        UserError: the configuration is wrong, or the session cannot start or continue. The message
            says why. An existing run loses nothing.
    """
    return train_session(as_config(config), on_log=on_log).folder


class Session(NamedTuple):
    """The outcome of a training session."""

    folder: Path
    stopped_by: int  # number of the signal; 0: the session has all its frames or its minutes


def train_session(config: Config, *, on_log: OnLog | None = None) -> Session:
    """As :func:`train`, and tell whether a signal stopped the session before its end."""
    start = resolve(config)
    if config.env.workers:
        start_resource_tracker()
    trainer = Trainer(start, on_log)
    try:
        with stop_on_signal() as stop:
            ended = trainer.run(stop)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{start.device} has no memory left. Use a smaller train.batch, "
            "behavior.starts_fraction or plan.imagine_fraction, or another size, in another "
            "run_dir."
        ) from error
    finally:
        trainer.close()
    return Session(start.folder, 0 if ended else stop.number)


class Trainer:
    """A run in training.

    ``frames`` counts environment frames, ``decisions`` counts actions, and ``updates`` counts
    gradient steps, over all sessions of the run.
    """

    def __init__(self, start: Start, on_log: OnLog | None = None):
        self.start_time = time.monotonic()
        self.config, self.folder, self.device = start.config, start.folder, start.device
        self.stop = Stop()
        saved = start.saved
        self.env = make_train_env(self.config, start.renderer, saved["episodes"] if saved else None)
        try:
            self._build(saved)
            bfloat16 = self.agent.world.use_bfloat16
            description = describe(self.env.spec, start.renderer, bfloat16)
            run_folder.record_session(self.folder, start.user_config, description)
            self.monitor = Monitor(
                start.user_config,
                self.folder,
                self.agent,
                self.replay,
                start.renderer,
                schedules=saved["due"] if saved else None,
                frame=self.frames,
                on_log=on_log,
            )
        except BaseException:
            self.env.close()
            raise
        self._log_settings(start.renderer)

    def _build(self, saved: dict[str, Any] | None) -> None:
        """Build the agent, the replay and the counters, and restore them from a checkpoint."""
        config, spec, train = self.config, self.env.spec, self.config.train
        self.rng = np.random.default_rng(config.seed)
        self.agent, compiled = make_agent(config, spec, self.device)
        if compiled != "off":
            log.info("functions are compiled: the first updates and plans take a minute")
        size = Replay.size_bytes(spec, config.replay.capacity)
        log.info("replay: %s rows, %s on disk", f"{config.replay.capacity:,}", gigabytes(size))
        self.replay = Replay(
            self.folder / "replay",
            spec,
            capacity=config.replay.capacity,
            envs=config.env.num_envs,
        )
        self.rows = train.context + train.length  # of a window
        self.batches = BatchSampler(self.replay, train.batch, self.rows, self.rng, self.device)
        self.ratio = Ratio(train.ratio, train.batch * train.length)
        self.frames = self.decisions = self.updates = 0
        self.checkpoint_schedule = Every(
            config.log.checkpoint_seconds,
            first=config.log.checkpoint_seconds if saved else FIRST_CHECKPOINT_SECONDS,
        )
        if saved:
            self._restore(saved)
        else:
            self.replay.clear()

    def _log_settings(self, renderer: Renderer | None) -> None:
        train, spec = self.config.train, self.env.spec
        rows = train.batch * train.length
        weights = sum(p.numel() for p in self.agent.parameters())
        log.info("run folder: %s", self.folder)
        log.info("agent: %s weights on %s", f"{weights:,}", self.device)
        if renderer:
            log.info(
                "images: %s, %s (%s)", renderer.backend, renderer.quality, renderer.description
            )
        log.info(
            "train ratio %g: each decision is replayed %g times, one update (%d rows) per "
            "%.3g decisions = %.3g frames",
            *(train.ratio, train.ratio, rows, rows / train.ratio),
            rows / train.ratio * spec.repeat,
        )

    # --- the loop ---------------------------------------------------------------------------

    def run(self, stop: Stop) -> bool:
        """Collect and learn until ``config.steps`` frames, the time limit, or a stop request.

        Returns:
            Whether the frames or the time limit are reached.
        """
        config, self.stop = self.config, stop
        if self.frames >= config.steps:
            log.info("%s is complete: set a larger steps=N to continue it", self.folder)
            return True
        self.monitor.start(self.frames, self.updates)
        self._learn()  # the updates that the last decision before the checkpoint has earned
        row = self._reset()
        carry = self.agent.initial(config.env.num_envs)
        last = False
        while not last and not stop.requested:
            action, carry = self._choose_action(row, carry)
            self.env.step_async(action)  # the environments step while the agent learns
            self._learn()
            try:
                row = self._receive()
            except StepInterruptedError:
                log.info("an environment does not answer: the run is saved without its last step")
                break
            last = self._out_of_time() or self.frames >= config.steps
            self.monitor.report(self.frames, self.updates, last=last)
            self._save_if_due()
        if last and self.frames < config.steps:
            log.info("the time limit of %g minutes is reached", config.train.minutes)
        self.save()
        log.info("%s frames, %s updates, saved in %s", self.frames, self.updates, self.folder)
        return last

    def _reset(self) -> Timestep:
        """Start an episode in every environment. Returns its first row (N)."""
        row, _ = self.env.reset()
        self._store(row)
        return row

    def _choose_action(self, row: Timestep, carry: Latent) -> tuple[np.ndarray, Latent]:
        """Actions (N, A) in [-1, 1] for the latest row (N), and the new carry."""
        with self.monitor.stopwatch.section("policy"):
            shape = (self.env.num_envs, self.env.spec.action_dim)
            if self.env.is_last.all():
                # Every environment resets next and ignores its action. A resumed run starts with
                # resets too. It continues bit for bit because no random number is drawn here.
                return np.zeros(shape, np.float32), carry
            tensors = row.to(self.device)
            if self.decisions < self.config.train.prefill:
                with torch.no_grad():
                    carry = self.agent.world.filter(tensors, carry)
                return self.rng.uniform(-1, 1, shape).astype(np.float32), carry
            action, carry, metrics = self.agent.explore(tensors, carry)
            self.monitor.add_metrics(metrics)
            return action.cpu().numpy(), carry

    def _receive(self) -> Timestep:
        """Wait for the environments, then store and count their row (N)."""
        with self.monitor.stopwatch.section("env"):
            row, frames = self.env.step_wait(lambda: self.stop.requested)
        self._store(row)
        self.frames += int(frames.sum())
        self.decisions += int((frames > 0).sum())  # a reset takes no frame and no decision
        self.monitor.add_row(row, frames, self.env.is_last)
        return row

    def _store(self, row: Timestep) -> None:
        count = self.env.num_envs
        # Each episode of each environment has its own number.
        self.replay.add(row, (self.env.episodes - 1) * count + np.arange(count))

    def _learn(self) -> None:
        """Make the updates that are due by the train ratio."""
        train, stopwatch = self.config.train, self.monitor.stopwatch
        if self.decisions < train.prefill or not self.replay.ready(self.rows):
            return
        for _ in range(self.ratio(self.decisions)):
            with stopwatch.section("replay"):
                batch, episode = self.batches.sample()
            with stopwatch.section("update"), self.batches.prefetch():
                metrics = self._update(batch, episode)
            if metrics is None:
                return
            self.updates += 1
            self.monitor.add_metrics(metrics)

    def _update(self, batch: Timestep, episode: Tensor) -> dict[str, Tensor] | None:
        """One update of the agent. Returns its metrics, or None if a stop request interrupted it.

        Raises:
            UserError: a loss or gradient is not finite.
        """
        try:
            return self.agent.update(batch, episode)
        except NonFiniteLossError as error:
            path = self._dump(batch)
            raise UserError(
                f"{error} The batch is in {path}. The last good checkpoint stays."
            ) from error
        except RuntimeError as error:
            # Ctrl-C in a terminal also ends the compiler that an update may be waiting for. The
            # losses and gradients are compiled before any weight changes, so the agent is intact.
            if self.stop.requested and is_compiler_failure(error):
                return None
            raise

    def _dump(self, batch: Timestep) -> Path:
        """Write a batch to a file in the run folder. Returns its path."""
        path, batch = self.folder / f"nonfinite-{self.updates}.npz", batch.map(lambda x: x.cpu())
        obs = {f"obs.{name}": x for name, x in batch.obs.items()}
        rest = {name: x for name, x in batch._asdict().items() if name != "obs"}
        np.savez_compressed(path, **obs, **rest)
        return path

    def _out_of_time(self) -> bool:
        limit = self.config.train.minutes * 60 or float("inf")
        return time.monotonic() - self.start_time > limit

    # --- checkpoints ------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        """Save a due checkpoint at the end of an episode, or after ``PATIENCE_SECONDS``.

        A run continues exactly only from the end of an episode.
        """
        seconds = time.monotonic() - self.start_time
        late = self.checkpoint_schedule.overdue(seconds - PATIENCE_SECONDS)
        if self.checkpoint_schedule.overdue(seconds) and (late or self.env.is_last.all()):
            self.checkpoint_schedule(seconds)
            self.save()

    def save(self) -> None:
        """Write a checkpoint with the complete state of the run. The last one is kept beside it.

        Raises:
            UserError: the checkpoint cannot be written. Those before it stay.
        """
        self.replay.flush()
        checkpoint.save(
            run_folder.checkpoint_path(self.folder),
            {
                "frames": self.frames,
                "decisions": self.decisions,
                "updates": self.updates,
                "episodes": [int(n) for n in self.env.episodes],
                "spec": self.env.spec.to_dict(),
                "agent": self.agent.state_dict(),
                "optimizer": self.agent.optimizer.state_dict(),
                "ratio": self.ratio.state_dict(),
                "due": self.monitor.state_dict(),
                "replay": self.replay.state_dict(),
                "random": checkpoint.random_state(),
                "sampler": checkpoint.generator_state(self.rng),
            },
        )
        run_folder.record_checkpoint(self.folder)

    def _restore(self, saved: dict[str, Any]) -> None:
        run_folder.restore(self.agent, saved["agent"], run_folder.checkpoint_path(self.folder))
        self.agent.optimizer.load_state_dict(saved["optimizer"])
        self.replay.load_state_dict(saved["replay"])
        self.frames, self.decisions = saved["frames"], saved["decisions"]
        self.updates = saved["updates"]
        self.ratio.load_state_dict(saved["ratio"])
        checkpoint.set_random_state(saved["random"])
        checkpoint.set_generator_state(self.rng, saved["sampler"])
        log.info("resuming from frame %d", self.frames)

    def close(self) -> None:
        """Close the environments and the files."""
        self.env.close()
        self.monitor.close()
        self.batches.close()
        self.replay.close()
