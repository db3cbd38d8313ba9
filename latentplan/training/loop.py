"""The training loop: processes, files, and the one axis, environment frames."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from latentplan.agent import NonFiniteLossError
from latentplan.config.loading import as_config
from latentplan.config.schema import Config
from latentplan.data.batches import BatchSampler
from latentplan.data.replay import Replay
from latentplan.envs import Renderer, make_train_env
from latentplan.runs import checkpoint, run_folder
from latentplan.runs.provenance import describe
from latentplan.runtime.clock import Every, Ratio
from latentplan.runtime.disk import gigabytes
from latentplan.training.compiling import is_compiler_failure, make_agent
from latentplan.training.monitor import Monitor
from latentplan.training.start import Start, resolve
from latentplan.types import Latent, Timestep, UserError

log = logging.getLogger("latentplan")
FIRST_CHECKPOINT_SECONDS = 30.0
PATIENCE_SECONDS = 25.0  # a due checkpoint waits this long for the end of an episode


OnLog = Callable[[dict[str, float]], object]


def train(
    config: Config | Mapping[str, Any] | Sequence[str], *, on_log: OnLog | None = None
) -> Path:
    """Train, or go on with the run in ``config.run_dir``.

    Args:
        config: a configuration, keys and values (``{"task": "walker_walk", "env.repeat": 2}``), or
            the files and ``key=value`` items of the command line.
        on_log: called with every row of metrics that is written: ``step`` (environment frames),
            ``time`` (seconds), and the metrics by name.

    Returns:
        The run folder.

    Raises:
        UserError: the configuration is wrong, or the session cannot begin or go on; the message
            says why. An existing run loses nothing.
    """
    start = resolve(as_config(config))
    trainer = Trainer(start, on_log)
    try:
        with stop_on_signal() as stop:
            trainer.run(stop)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{start.device} has no memory left. A smaller train.batch, behavior.starts_fraction "
            "or plan.imagine_fraction, or another size, takes less. Choose another run_dir for it."
        ) from error
    finally:
        trainer.close()
    return start.folder


class Stop:
    """Set by the first Ctrl-C; the loop looks at it between steps."""

    requested = False


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM asks the loop to save and leave; a second one interrupts it."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        log.info("stopping: saving a checkpoint (once more to leave at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """A run in training. ``frames`` counts environment frames, ``decisions`` counts actions."""

    def __init__(self, start: Start, on_log: OnLog | None = None):
        self.begin = time.monotonic()
        self.config, self.folder, self.device = start.config, start.folder, start.device
        saved = start.saved
        self.env = make_train_env(self.config, start.renderer, saved["episodes"] if saved else None)
        try:
            self._build(saved)
            bfloat16 = self.agent.world.use_bfloat16
            description = describe(self.env.spec, start.renderer, bfloat16)
            run_folder.write(self.folder, start.asked, description)
            self.monitor = Monitor(
                start.asked,
                self.folder,
                self.agent,
                self.replay,
                start.renderer,
                due=saved["due"] if saved else None,
                frame=self.frames,
                on_log=on_log,
            )
        except BaseException:
            self.env.close()
            raise
        self._announce(start.renderer)

    def _build(self, saved: dict[str, Any] | None) -> None:
        config, spec, train = self.config, self.env.spec, self.config.train
        self.rng = np.random.default_rng(config.seed)
        self.agent, compiled = make_agent(config, spec, self.device)
        if compiled != "off":
            log.info("compiled: %s; the first updates and plans take a minute", compiled)
        size = Replay.size_bytes(spec, config.replay.capacity)
        log.info("replay: %s rows, %s on disk", f"{config.replay.capacity:,}", gigabytes(size))
        self.replay = Replay(
            self.folder / "replay",
            spec,
            capacity=config.replay.capacity,
            envs=config.env.num_envs,
        )
        self.batches = BatchSampler(self.replay, train.batch, train.length, self.rng, self.device)
        self.ratio = Ratio(train.ratio, train.batch * train.length)
        self.frames = self.decisions = self.updates = 0
        self.save_due = Every(
            config.log.checkpoint_seconds,
            first=config.log.checkpoint_seconds if saved else FIRST_CHECKPOINT_SECONDS,
        )
        if saved:
            self._restore(saved)
        else:
            self.replay.clear()

    def _announce(self, renderer: Renderer | None) -> None:
        train, spec = self.config.train, self.env.spec
        rows = train.batch * train.length
        weights = sum(p.numel() for p in self.agent.parameters())
        log.info("run folder: %s", self.folder)
        log.info("agent: %s weights on %s", f"{weights:,}", self.device)
        if renderer:
            log.info(
                "pictures: %s, %s (%s)", renderer.backend, renderer.quality, renderer.description
            )
        log.info(
            "train ratio %g: each decision is replayed %g times, one update (%d rows) per "
            "%.3g decisions = %.3g frames",
            *(train.ratio, train.ratio, rows, rows / train.ratio),
            rows / train.ratio * spec.repeat,
        )

    # --- the loop ---------------------------------------------------------------------------

    def run(self, stop: Stop) -> None:
        """Collect and learn until ``config.steps`` frames, the time limit, or ``stop``."""
        config, self.stop = self.config, stop
        if self.frames >= config.steps:
            log.info("%s is complete: a larger steps=N goes on with it", self.folder)
            return
        limit = config.train.minutes * 60 or float("inf")
        self.monitor.begin(self.frames, self.updates)
        row = self._reset()
        carry = self.agent.initial(config.env.num_envs)
        last = False
        while not last and not stop.requested:
            row, carry = self._step(row, carry)
            out_of_time = time.monotonic() - self.begin > limit
            last = out_of_time or self.frames >= config.steps
            self.monitor.report(self.frames, self.updates, last=last)
            self._save_when_due()
        if last and self.frames < config.steps:
            log.info("time limit of %g minutes reached", config.train.minutes)
        self.save()
        log.info("%s frames, %s updates, saved in %s", self.frames, self.updates, self.folder)

    def _reset(self) -> Timestep:
        self._learn()  # what the last decision before a checkpoint earned
        row, _ = self.env.reset()
        self._store(row)
        return row

    def _step(self, row: Timestep, carry: Latent) -> tuple[Timestep, Latent]:
        """One decision everywhere. Environments work while the learner does."""
        watch = self.monitor.watch
        with watch.section("policy"):
            shape = (self.env.num_envs, self.env.spec.action_dim)
            if self.env.is_last.all():
                # Every environment is about to be reset and no action will be looked at; drawing
                # none makes a resumed run (which starts with resets) go on bit for bit.
                action = np.zeros(shape, np.float32)
            else:
                tensors = row.to(self.device)
                if self.decisions < self.config.train.prefill:
                    with torch.no_grad():
                        carry = self.agent.world.filter(tensors, carry)
                    action = self.rng.uniform(-1, 1, shape).astype(np.float32)
                else:
                    chosen, carry, metrics = self.agent.explore(tensors, carry)
                    self.monitor.update(metrics)
                    action = chosen.cpu().numpy()
        self.env.step_async(action)
        self._learn()
        with watch.section("env"):
            row, frames = self.env.step_wait()
        self._store(row)
        self.frames += int(frames.sum())
        self.decisions += int((frames > 0).sum())
        self.monitor.row(row, frames, self.env.is_last)
        return row, carry

    def _store(self, row: Timestep) -> None:
        count = self.env.num_envs
        self.replay.add(row, (self.env.episodes - 1) * count + np.arange(count))

    def _learn(self) -> None:
        train, watch = self.config.train, self.monitor.watch
        if self.decisions < train.prefill or not self.replay.ready(train.length):
            return
        for _ in range(self.ratio(self.decisions)):
            with watch.section("replay"):
                batch, episode = self.batches.sample()
            with watch.section("update"), self.batches.prefetch():
                try:
                    metrics = self.agent.update(batch, episode)
                except NonFiniteLossError as error:
                    raise UserError(self._dump(batch, error)) from error
                except RuntimeError as error:
                    # A terminal's Ctrl-C also kills the compiler that an update waits for; it
                    # compiles for the losses and their gradients, before any weight is moved.
                    if not (self.stop.requested and is_compiler_failure(error)):
                        raise
                    return
            self.updates += 1
            self.monitor.update(metrics)

    def _dump(self, batch: Timestep, error: NonFiniteLossError) -> str:
        path, batch = self.folder / f"nonfinite-{self.updates}.npz", batch.map(lambda x: x.cpu())
        obs = {f"obs.{name}": x for name, x in batch.obs.items()}
        rest = {name: x for name, x in batch._asdict().items() if name != "obs"}
        np.savez_compressed(path, **obs, **rest)
        return f"{error} The batch is in {path}; the last good checkpoint stays."

    # --- keeping ----------------------------------------------------------------------------

    def _save_when_due(self) -> None:
        """At the end of an episode when one comes soon, since a run goes on exactly from there."""
        seconds = time.monotonic() - self.begin
        late = self.save_due.overdue(seconds - PATIENCE_SECONDS)
        if self.save_due.overdue(seconds) and (late or self.env.is_last.all()):
            self.save_due(seconds)
            self.save()

    def save(self) -> None:
        """Write everything that the run needs to go on."""
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
        run_folder.note_checkpoint(self.folder)

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
        self.env.close()
        self.monitor.close()
        self.batches.close()
        self.replay.close()
