"""The training loop: processes, files, and the one axis, environment frames."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from tqdm import tqdm

from latentplan import checkpoint, run_folder
from latentplan.agent import Agent, NonFiniteLossError
from latentplan.allocator import keep_memory
from latentplan.clock import Every, Ratio, Stopwatch, memory
from latentplan.config import Config, to_yaml
from latentplan.envs import make_vector
from latentplan.evaluate import make_eval_env, pick_renderer, run_episodes, to_tensors
from latentplan.inspection.film import open_loop_film
from latentplan.logger import Logger
from latentplan.replay import Replay, gigabytes
from latentplan.types import Timestep, UserError

log = logging.getLogger("latentplan")
FIRST_CHECKPOINT_SECONDS = 30.0
PATIENCE_SECONDS = 25.0  # a due checkpoint waits this long for the end of an episode


def train(config: Config) -> Path:
    """Train, or go on with the run in ``config.run_dir``; return the folder.

    Raises:
        UserError: see the message; nothing of an existing run is lost.
    """
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    keep_memory()
    folder = Path(config.run_dir)
    if (folder / "config.yaml").exists():
        run_folder.check_same(folder, config)
    trainer = Trainer(config, folder)
    try:
        with stop_on_signal() as stop:
            trainer.run(stop)
    finally:
        trainer.close()
    return folder


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
    """Everything that a run holds. ``frames`` counts environment frames, ``decisions`` actions."""

    def __init__(self, config: Config, folder: Path):
        self.begin = time.monotonic()
        self.config, self.folder = config, folder
        self.device = run_folder.pick_device(config.device)
        self.renderer = pick_renderer(config)
        saved = None
        if run_folder.checkpoint_path(folder).exists():
            saved = checkpoint.load(run_folder.checkpoint_path(folder))
        self.env = make_vector(
            config.task,
            config.obs,
            config.env,
            count=config.env.count,
            seed=config.seed,
            renderer=self.renderer,
            first_episodes=saved["episodes"] if saved else None,
        )
        self.eval_env = None
        self.eval_episodes: list[int] = []  # begun by each, so that a resumed run plays the next
        try:
            self._build(saved)
        except BaseException:
            self.env.close()
            raise

    def _build(self, saved: dict | None) -> None:
        config, spec = self.config, self.env.spec
        torch.manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        self.agent = Agent(spec, config, self.device)
        size = Replay.size_bytes(spec, config.replay.capacity)
        log.info("replay: %s rows, %s on disk", f"{config.replay.capacity:,}", gigabytes(size))
        self.replay = Replay(
            self.folder / "replay",
            spec,
            capacity=config.replay.capacity,
            envs=config.env.count,
        )
        train = config.train
        self.ratio = Ratio(train.ratio, train.batch * train.length)
        self.due = {
            "log": Every(config.log.every),
            "eval": Every(config.eval.every),
            "film": Every(config.log.film_every),
        }
        self.frames = self.decisions = self.updates = 0
        if saved:
            self._restore(saved)
        else:
            self.replay.clear()
        run_folder.write(
            self.folder,
            config,
            run_folder.describe(spec, self.renderer.description if self.renderer else "none"),
        )
        self.logger = Logger(self.folder, frame=self.frames)
        if not saved:
            self.logger.text("config", f"```yaml\n{to_yaml(config)}```", 0)
        self.save_due = Every(
            config.log.checkpoint_seconds, first=0.0 if saved else FIRST_CHECKPOINT_SECONDS
        )
        self.save_due(0.0)
        self.watch = Stopwatch()
        self.returns = np.zeros(config.env.count)
        self.lengths = np.zeros(config.env.count, dtype=int)
        self._mark = (time.monotonic(), self.frames, self.updates)
        self._announce()

    def _announce(self) -> None:
        train, spec = self.config.train, self.env.spec
        rows = train.batch * train.length
        weights = sum(p.numel() for p in self.agent.parameters())
        log.info("agent: %s weights on %s", f"{weights:,}", self.device)
        log.info(
            "train ratio %g: each decision is replayed %g times, one update (%d rows) per "
            "%.3g decisions = %.3g frames",
            *(train.ratio, train.ratio, rows, rows / train.ratio),
            rows / train.ratio * spec.repeat,
        )

    # --- the loop ---------------------------------------------------------------------------

    def run(self, stop: Stop) -> None:
        """Collect and learn until ``config.steps`` frames, the time limit, or ``stop``."""
        config = self.config
        if self.frames >= config.steps:  # asked for again: not even a reset row is added
            log.info("the run has its %d frames; set steps higher to go on", config.steps)
            return
        bar = tqdm(
            total=config.steps,
            initial=self.frames,
            unit="frame",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        limit = config.train.minutes * 60 or float("inf")
        row = self._begin()
        carry = self.agent.initial(config.env.count)
        while self.frames < config.steps and not stop.requested:
            if time.monotonic() - self.begin > limit:
                log.info("time limit of %g minutes reached", config.train.minutes)
                break
            row, carry = self._step(row, carry)
            bar.update(self.frames - bar.n)
            self._report(bar)
            self._checkpoint_when_due()
        if self.frames >= config.steps and self.due["eval"].overdue(self.frames):
            self._evaluate()
        self.save()
        bar.close()
        log.info("%s frames, %s updates, saved in %s", self.frames, self.updates, self.folder)

    def _begin(self) -> Timestep:
        self._learn()  # what the last decision before a checkpoint earned
        row, _ = self.env.reset()
        self._store(row)
        return row

    def _step(self, row: Timestep, carry: object) -> tuple[Timestep, object]:
        """One decision everywhere. Environments work while the learner does."""
        with self.watch.section("policy"):
            if self.env.is_last.all():
                # Every environment is about to be reset and no action will be looked at; asking
                # for none makes a resumed run (which starts with resets) go on bit for bit.
                action = np.zeros((self.env.count, self.env.spec.action_dim), np.float32)
            else:
                tensor, carry = self.agent.act(to_tensors(row, self.device), carry)
                action = tensor.cpu().numpy()
                if self.decisions < self.config.train.prefill:
                    action = self.rng.uniform(-1, 1, action.shape).astype(np.float32)
        self.env.step_async(action)
        self._learn()
        with self.watch.section("env"):
            row, frames = self.env.step_wait()
        self._store(row)
        self.frames += int(frames.sum())
        self.decisions += int((frames > 0).sum())
        self._count_episodes(row, frames)
        return row, carry

    def _store(self, row: Timestep) -> None:
        count = self.env.count
        self.replay.add(row, (self.env.episodes - 1) * count + np.arange(count))

    def _learn(self) -> None:
        train = self.config.train
        if self.decisions < train.prefill or not self.replay.ready(train.length):
            return
        for _ in range(self.ratio(self.decisions)):
            with self.watch.section("replay"):
                batch, episode = self.replay.sample(train.batch, train.length, self.rng)
                tensors = to_tensors(batch, self.device)
                episodes = torch.as_tensor(episode).to(self.device)
            with self.watch.section("update"):
                try:
                    metrics = self.agent.update(tensors, episodes)
                except NonFiniteLossError as error:
                    raise UserError(self._dump(batch, error)) from error
            self.updates += 1
            self.logger.add(metrics)

    def _dump(self, batch: Timestep, error: NonFiniteLossError) -> str:
        path = self.folder / f"nonfinite-{self.updates}.npz"
        obs = {f"obs.{name}": x for name, x in batch.obs.items()}
        rest = {name: x for name, x in batch._asdict().items() if name != "obs"}
        np.savez_compressed(path, **obs, **rest)
        return f"{error} The batch is in {path}; the last good checkpoint stays."

    # --- looking and keeping ----------------------------------------------------------------

    def _count_episodes(self, row: Timestep, frames: np.ndarray) -> None:
        self.returns = np.where(row.is_first, 0.0, self.returns + row.reward)
        self.lengths = np.where(row.is_first, 0, self.lengths + frames)
        for i in np.flatnonzero(self.env.is_last):
            self.logger.add(
                {"episode/score": self.returns[i], "episode/length": float(self.lengths[i])}
            )

    def _report(self, bar: tqdm) -> None:
        if self.updates and self.due["eval"](self.frames):
            self._evaluate()
        if self.updates and self.env.spec.images and self.due["film"](self.frames):
            self._film()
        if not self.due["log"](self.frames):
            return
        then, frames, updates = self._mark
        now = time.monotonic()
        self._mark = (now, self.frames, self.updates)
        seconds = max(now - then, 1e-9)
        rates = {
            "fps/env": (self.frames - frames) / seconds,
            "fps/updates": (self.updates - updates) / seconds,
            **{f"fps/share_{k}": v for k, v in self.watch.shares().items()},
        }
        self.watch.reset()
        counts = {"train/updates": self.updates, "replay/rows": len(self.replay)}
        line = self.logger.write(self.frames, now={**rates, **counts, **memory()})
        shown = {
            "return": line.get("episode/score"),
            "eval": line.get("episode/eval_score"),
            "updates/s": line["fps/updates"],
        }
        text = ", ".join(f"{k} {v:.3g}" for k, v in shown.items() if v is not None)
        bar.set_postfix_str(text)
        if bar.disable:
            left = (self.config.steps - self.frames) / max(rates["fps/env"], 1e-9)
            log.info("frame %d/%d: %s, %.0f min left", self.frames, bar.total, text, left / 60)

    def _evaluate(self) -> None:
        config = self.config
        with self.watch.section("eval"):
            if self.eval_env is None:
                count = min(config.eval.episodes, 2 if config.env.workers else 1)
                if len(self.eval_episodes) != count:
                    self.eval_episodes = [0] * count
                self.eval_env = make_eval_env(
                    config, self.renderer, count, config.seed, self.eval_episodes
                )
            scores = run_episodes(self.agent, self.eval_env, config.eval.episodes)
            self.eval_episodes = [int(n) for n in self.eval_env.episodes]
        self.logger.add(
            {
                "episode/eval_score": float(np.mean(scores.returns)),
                "episode/eval_std": float(np.std(scores.returns)),
                "episode/eval_length": float(np.mean(scores.lengths)),
            }
        )
        log.info("evaluation at frame %d: %.1f", self.frames, np.mean(scores.returns))
        if scores.film is not None and config.eval.video:
            self.logger.video("eval_video", scores.film, self.frames, fps=30)

    def _film(self) -> None:
        """An open-loop film; draws from generators of its own, so that looking changes nothing."""
        train, context = self.config.train, self.config.log.film_context
        rng = np.random.default_rng(self.frames)
        batch, _ = self.replay.sample(3, train.length, rng)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            decoded = self.agent.open_loop(to_tensors(batch, self.device), context)
        name = self.env.spec.images[0]
        film = open_loop_film(batch.obs[name], decoded[name].cpu().numpy(), context)
        self.logger.video("open_loop", film, self.frames, fps=8)

    def _checkpoint_when_due(self) -> None:
        """At the end of an episode when one comes soon, since a run goes on exactly from there."""
        seconds = time.monotonic() - self.begin
        late = self.save_due.overdue(seconds - PATIENCE_SECONDS)
        if self.save_due.overdue(seconds) and (late or self.env.is_last.all()):
            self.save_due(seconds)
            self.save()

    def save(self) -> None:
        """Write everything that the run needs to go on."""
        self.replay.flush()
        spec = self.env.spec
        checkpoint.save(
            run_folder.checkpoint_path(self.folder),
            {
                "frames": self.frames,
                "decisions": self.decisions,
                "updates": self.updates,
                "episodes": [int(n) for n in self.env.episodes],
                "eval_episodes": self.eval_episodes,
                "spec": {
                    "obs": {k: [list(shape), dtype] for k, (shape, dtype) in spec.obs.items()},
                    "action_dim": spec.action_dim,
                    "repeat": spec.repeat,
                },
                "agent": self.agent.state_dict(),
                "optimizer": self.agent.optimizer.state_dict(),
                "ratio": self.ratio.state_dict(),
                "due": {name: every.state_dict() for name, every in self.due.items()},
                "replay": self.replay.state_dict(),
                "random": checkpoint.random_state(),
                "sampler": checkpoint.generator_state(self.rng),
            },
        )

    def _restore(self, saved: dict) -> None:
        run_folder.restore(self.agent, saved["agent"], run_folder.checkpoint_path(self.folder))
        self.agent.optimizer.load_state_dict(saved["optimizer"])
        self.replay.load_state_dict(saved["replay"])
        self.frames, self.decisions = saved["frames"], saved["decisions"]
        self.updates = saved["updates"]
        self.eval_episodes = saved.get("eval_episodes", [])
        self.ratio.load_state_dict(saved["ratio"])
        for name, every in self.due.items():
            every.load_state_dict(saved["due"][name])
        checkpoint.set_random_state(saved["random"])
        checkpoint.set_generator_state(self.rng, saved["sampler"])
        log.info("resuming from frame %d", self.frames)

    def close(self) -> None:
        self.env.close()
        if self.eval_env is not None:
            self.eval_env.close()
        self.replay.close()
        self.logger.close()
