"""The training loop: collect experience, learn from the replay, evaluate, log and save.

Environment frames are the time axis of all schedules and logs, except for checkpoints, which are
due by seconds.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentplan.agent import NonFiniteLossError
from latentplan.data.batches import BatchSampler
from latentplan.data.recording import Recording
from latentplan.data.replay import Replay
from latentplan.envs import (
    Renderer,
    StepInterruptedError,
    TooManyFaultsError,
    VectorEnv,
    make_train_env,
)
from latentplan.envs.actions import random_actions
from latentplan.runs import checkpoint, initial_weights, run_folder, weights
from latentplan.runs.initial_weights import InitialWeights
from latentplan.runs.kept import KeptCheckpoints
from latentplan.runs.provenance import describe
from latentplan.runtime.clock import Every, Ratio
from latentplan.training.compiling import is_compiler_failure, make_agent
from latentplan.training.memory import check_memory
from latentplan.training.monitor import Monitor, OnLog
from latentplan.training.offline import NoEnvironment, fill
from latentplan.training.recovery import Recovery
from latentplan.training.start import Start
from latentplan.training.stopping import Stop, StopInterrupt
from latentplan.types import Latent, PlanTarget, Timestep

log = logging.getLogger("latentplan")
FIRST_CHECKPOINT_SECONDS = 30.0
PATIENCE_SECONDS = 25.0  # a due checkpoint waits this long for the end of an episode


class Trainer:
    """A run in training.

    ``frames`` counts environment frames, ``decisions`` counts actions, and ``updates`` counts
    gradient steps, over all sessions of the run.
    """

    def __init__(self, start: Start, on_log: OnLog | None = None):
        self.start_time = time.monotonic()
        self.config, self.folder, self.device = start.config, start.folder, start.device
        self.stop = Stop()
        self.ended = False  # whether all frames or the time limit are reached
        saved = start.saved
        if start.offline:
            self.env: VectorEnv = NoEnvironment(start.offline.spec)
        else:
            episodes = saved["episodes"] if saved else None
            self.env = make_train_env(self.config, start.renderer, episodes)
        try:
            self._build(saved, start.initial, start.offline and start.offline.recording)
            bfloat16 = self.agent.world.use_bfloat16
            description = describe(self.env.spec, start.renderer, bfloat16)
            run_folder.record_session(self.folder, start.user_config, description)
            self.monitor = Monitor(
                start.user_config,
                self.folder,
                self.agent,
                self.replay,
                start.renderer,
                self.stop,
                schedules=saved["due"] if saved else None,
                frame=self.frames,
                on_log=on_log,
            )
        except BaseException:
            self.env.close()
            raise
        self._log_settings(start.renderer)

    def _build(
        self,
        saved: dict[str, Any] | None,
        initial: InitialWeights | None,
        recording: Recording | None,
    ) -> None:
        """Build the agent, the replay and the counters, and restore them from a checkpoint.

        A new run takes the weights of another run that fit, and the rows of a recording, if there
        are any.
        """
        config, spec, train = self.config, self.env.spec, self.config.train
        self.rng = np.random.default_rng(config.seed)
        self.agent, compiled = make_agent(config, spec, self.device)
        if compiled != "off":
            log.info("functions are compiled: the first updates and plans take a minute")
        check_memory(self.agent, config, spec)
        if initial is not None:
            initial_weights.apply(self.agent, initial)
        self.replay = Replay(
            self.folder / "replay",
            spec,
            capacity=config.replay.capacity,
            envs=config.env.num_envs,
            plans=config.distill.stored,
        )
        self.rows = train.context + train.length  # of a window
        self.batches = BatchSampler(self.replay, train.batch, self.rows, self.rng, self.device)
        self.ratio = Ratio(train.ratio, train.batch * train.length)
        self.recovery = Recovery(self.agent, self.folder)
        self.frames = self.decisions = self.updates = self.earlier_faults = 0
        self.checkpoint_schedule = Every(
            config.log.checkpoint_seconds,
            first=config.log.checkpoint_seconds if saved else FIRST_CHECKPOINT_SECONDS,
        )
        if saved:
            self._restore(saved)
        else:
            self.replay.clear()
            if recording is not None:
                fill(self.folder / "replay", self.replay, recording, config)
        best = saved["best_score"] if saved else None
        self.kept = KeptCheckpoints(self.folder, config.log.keep, self.frames, best)

    def _log_settings(self, renderer: Renderer | None) -> None:
        train, spec = self.config.train, self.env.spec
        rows = train.batch * train.length
        weights = sum(p.numel() for p in self.agent.parameters())
        log.info("run folder: %s", self.folder)
        log.info("agent: %s weights on %s", f"{weights:,}", self.device)
        prefill = 0 if train.offline else train.prefill
        log.info(
            "protocol: action repeat %d, at most %s frames per episode, discount %.4g per "
            "decision, %s random decisions first",
            *(spec.repeat, f"{self.config.env.episode_frames:,}"),
            *(self.config.behavior.discount, f"{prefill:,}"),
        )
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

    def run(self) -> bool:
        """Collect and learn until ``config.steps`` frames, the time limit, or a stop request.

        Returns:
            Whether the frames or the time limit are reached.

        Raises:
            TooManyFaultsError: the environments had too many faults. The run is saved.
        """
        config = self.config
        if self.frames >= config.steps:
            log.info("%s is complete: set a larger steps=N to continue it", self.folder)
            run_folder.record_checkpoint(self.folder, self.frames)  # earlier versions did not
            return True
        self.monitor.start(self.frames, self.updates)
        try:
            self._collect_and_learn()
        except StopInterrupt:
            log.info("the work in progress is given up")
        except StepInterruptedError:
            log.info("an environment does not answer: the run is saved without its last step")
        except TooManyFaultsError:
            self.save()  # a run that goes on meets other episodes
            raise
        if self.ended and self.frames < config.steps:
            log.info("the time limit of %g minutes is reached", config.train.minutes)
        begin = time.monotonic()
        self.save()
        log.info(
            "%s frames, %s updates, saved in %s (in %.1f s)",
            *(self.frames, self.updates, self.folder, time.monotonic() - begin),
        )
        return self.ended

    def _collect_and_learn(self) -> None:
        """Collect and learn until ``ended``, or until a stop request."""
        if self.config.train.offline:
            return self._learn_offline()
        self._learn()  # the updates that the last decision before the checkpoint has earned
        row = self._reset()
        carry = self.agent.initial(self.config.env.num_envs)
        while not self.ended and not self.stop.requested:
            with self.stop.interruptible():  # the first plans are compiled here
                action, carry, plan = self._choose_action(row, carry)
            self.env.step_async(action)  # the environments step while the agent learns
            self._learn()
            row = self._receive(plan)
            self._finish_decision()

    def _learn_offline(self) -> None:
        """Learn until ``ended``, or until a stop request.

        Decisions and frames are counted as if an environment were stepped. So the train ratio says
        how many of them one update is worth, and all schedules are those of a run that collects.
        """
        while not self.ended and not self.stop.requested:
            self._learn()
            self.decisions += 1
            self.frames += self.env.spec.repeat
            self.monitor.count(faults=0, skipped=self.recovery.skipped)
            self._finish_decision()

    def _finish_decision(self) -> None:
        """Report and save what is due after a decision."""
        self.ended = self._out_of_time() or self.frames >= self.config.steps
        score = self.monitor.report(self.frames, self.updates, last=self.ended)
        self.kept.report(self.agent, self.frames, score)
        self._save_if_due()

    @property
    def faults(self) -> int:
        """Faults of the training environments, over all sessions of the run."""
        return self.earlier_faults + self.env.faults

    def _reset(self) -> Timestep:
        """Start an episode in every environment. Returns its first row (N)."""
        row, _ = self.env.reset(lambda: self.stop.requested)
        self._store(row, None)
        return row

    def _choose_action(
        self, row: Timestep, carry: Latent
    ) -> tuple[np.ndarray, Latent, PlanTarget | None]:
        """Actions (N, A) in [-1, 1] for the latest row (N), the new carry, and plans (N)."""
        with self.monitor.stopwatch.section("policy"):
            count, spec = self.env.num_envs, self.env.spec
            if self.env.is_last.all():
                # Every environment resets next and ignores its action. A resumed run starts with
                # resets too. It continues bit for bit because no random number is drawn here.
                return np.zeros((count, spec.action_dim), np.float32), carry, None
            tensors = row.to(self.device)
            if self.decisions < self.config.train.prefill:
                with torch.no_grad():
                    carry = self.agent.world.filter(tensors, carry)
                return random_actions(self.rng, count, spec), carry, None
            action, carry, plan, metrics = self.agent.explore(tensors, carry)
            self.monitor.add_metrics(metrics)
            return action.cpu().numpy(), carry, plan

    def _receive(self, plan: PlanTarget | None) -> Timestep:
        """Wait for the environments, then store and count their row (N), with the plans (N) that
        chose its actions."""
        with self.monitor.stopwatch.section("env"):
            row, frames = self.env.step_wait(lambda: self.stop.requested)
        self._store(row, plan)
        self.frames += int(frames.sum())
        self.decisions += int((frames > 0).sum())  # a reset takes no frame and no decision
        self.monitor.count(faults=self.faults, skipped=self.recovery.skipped)
        self.monitor.add_row(row, frames, self.env.is_last)
        return row

    def _store(self, row: Timestep, plan: PlanTarget | None) -> None:
        count = self.env.num_envs
        if self.config.distill.stored and plan is not None:
            mean, std, gain = (x.float().cpu().numpy() for x in plan)
            gain = np.where(row.is_first, np.float32(0), gain)  # a reset ignores its action
            row = row._replace(prev_plan=PlanTarget(mean, std, gain))
        # Each episode of each environment has its own number.
        self.replay.add(row, (self.env.episodes - 1) * count + np.arange(count))

    def _learn(self) -> None:
        """Make the updates that are due by the train ratio."""
        train, stopwatch = self.config.train, self.monitor.stopwatch
        prefill = 0 if train.offline else train.prefill
        if self.decisions < prefill or not self.replay.ready(self.rows):
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
        """One update of the agent.

        Returns:
            Its metrics, or None if there was no update: its loss is not finite, or a stop request
            interrupted it.

        Raises:
            UserError: losses or gradients are not finite, and stay so.
        """
        try:
            metrics = self.agent.update(batch, episode, self.stop.interruptible())
        except NonFiniteLossError as error:
            self.recovery.skip(error, batch, self.updates)
            return None
        except RuntimeError as error:
            # Ctrl-C in a terminal also ends the compiler that an update may be waiting for. The
            # losses and gradients are compiled before any weight changes, so the agent is intact.
            if self.stop.requested and is_compiler_failure(error):
                return None
            raise
        self.recovery.updated()
        return metrics

    def _out_of_time(self) -> bool:
        limit = self.config.train.minutes * 60 or float("inf")
        return time.monotonic() - self.start_time > limit

    # --- checkpoints ------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        """Save a due checkpoint at the end of an episode, or after ``PATIENCE_SECONDS``.

        A run continues exactly only from the end of an episode, and only while the rows after the
        checkpoint have overwritten spare rows of the replay alone. A checkpoint is therefore also
        due when half of these are used. None is written while losses are not finite.
        """
        if self.ended or self.recovery.in_a_row:
            return  # the end of the session saves, and no checkpoint holds suspected weights
        seconds, used = time.monotonic() - self.start_time, self.replay.spare_used
        due = self.checkpoint_schedule.overdue(seconds) or used > 0.5
        late = self.checkpoint_schedule.overdue(seconds - PATIENCE_SECONDS) or used > 0.9
        if due and (late or self.env.is_last.all()):
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
                "best_score": self.kept.best_score,
                "episodes": [int(n) for n in self.env.episodes],
                "spec": self.env.spec.to_dict(),
                "agent": self.agent.state_dict(),
                "optimizer": self.agent.optimizer.state_dict(),
                "ratio": self.ratio.state_dict(),
                "due": self.monitor.state_dict(),
                "faults": self.faults,
                "skipped_batches": self.recovery.skipped,
                "replay": self.replay.state_dict(),
                "random": checkpoint.random_state(),
                "sampler": checkpoint.generator_state(self.rng),
            },
        )
        run_folder.record_checkpoint(self.folder, self.frames)
        self.recovery.saved()

    def _restore(self, saved: dict[str, Any]) -> None:
        path = run_folder.checkpoint_path(self.folder)
        weights.restore(self.agent, saved["agent"], path)
        weights.restore_optimizer(self.agent, saved["optimizer"], path)
        self.replay.load_state_dict(saved["replay"])
        self.frames, self.decisions = saved["frames"], saved["decisions"]
        self.updates, self.earlier_faults = saved["updates"], saved["faults"]
        self.recovery.skipped = saved["skipped_batches"]
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
