"""Several environments stepped as one, in worker processes or in this one.

Built on Gymnasium's vector environments (reset on the *next* step: an episode's last observation
is an ordinary row). What they lack is added here: rows aligned as in `latentplan.types`, clear
errors when a worker hangs or dies, processes that never outlive their owner.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from latentplan.config.schema import EnvConfig
from latentplan.envs.simulator import Spaces
from latentplan.envs.workers import EnvMaker, Recipe, describe_apart, main_hidden
from latentplan.types import EnvSpec, Timestep, UserError

_CLOSE_SECONDS = 5.0  # for workers to leave by themselves


class VectorEnv:
    """``num_envs`` environments of one task; N = num_envs.

    `step` gives ``(row, frames)``: a numpy `Timestep` (N, ...) aligned as in `latentplan.types`
    and the frames (N,) that each decision used. A row after an episode's end begins the next
    episode: its action is ignored, its frames are 0. Use it as a context manager, or `close` it.
    A worker that hangs, dies or fails raises `UserError`, and all workers are gone by then.
    """

    def __init__(
        self,
        recipe: Recipe,
        env: EnvConfig,
        *,
        num_envs: int,
        seed: int,
        mode: str,
        first_episodes: Sequence[int] | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.episodes = np.array(first_episodes or [0] * num_envs, np.int64)  # begun so far
        self.is_last = np.zeros(num_envs, bool)  # the row just returned ended its episode
        self._task, self._timeout, self._size = recipe.task, env.timeout, env.image_size
        apart = env.workers and not recipe.task.startswith("dummy:")
        known = describe_apart(recipe, env.timeout) if apart else recipe.describe()
        self.spec = _spec_of(known, env)
        makers = [
            EnvMaker(recipe, known, env, seed, mode, i, int(self.episodes[i]), os.getpid())
            for i in range(num_envs)
        ]
        self._pending: np.ndarray | None = None
        self._async = env.workers
        if env.workers:
            self._env: Any = self._start(makers)  # of two classes with different methods
        else:
            self._env = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)

    def _start(self, makers: Sequence[EnvMaker]) -> AsyncVectorEnv:
        try:
            with main_hidden():
                return AsyncVectorEnv(
                    makers, context="spawn", autoreset_mode=AutoresetMode.NEXT_STEP
                )
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise UserError(
                f"A worker process of {self._task} died while it started; "
                "was the program changed under a run?"
            ) from error

    def reset(self) -> tuple[Timestep, np.ndarray]:
        """Begin an episode everywhere; returns its rows and zero frames (N,)."""
        with self._trouble():
            if self._async:
                self._env.reset_async()
                observation, _ = self._env.reset_wait(timeout=self._timeout)
            else:
                observation, _ = self._env.reset()
        self._pending = None
        return self._row(
            observation,
            action=np.zeros((self.num_envs, self.spec.action_dim), np.float32),
            reward=np.zeros(self.num_envs),
            first=np.ones(self.num_envs, bool),
            terminated=np.zeros(self.num_envs, bool),
            truncated=np.zeros(self.num_envs, bool),
        ), np.zeros(self.num_envs, np.int64)

    def step_async(self, action: np.ndarray) -> None:
        """Hand out actions (N, A) in [-1, 1]; the workers go on while the caller does too.

        Raises:
            ValueError: they are not finite, or of another shape.
        """
        action = np.asarray(action, np.float32)
        shape = (self.num_envs, self.spec.action_dim)
        if action.shape != shape or not np.isfinite(action).all():
            raise ValueError(f"actions must be finite and of shape {shape}, got {action!r}")
        self._pending = np.clip(action, -1.0, 1.0)
        if self._async:
            with self._trouble():
                self._env.step_async(self._pending)

    def step_wait(self) -> tuple[Timestep, np.ndarray]:
        """The rows that the actions handed out led to, and the frames (N,) used.

        Raises:
            RuntimeError: none were handed out.
            UserError: an environment failed.
        """
        if self._pending is None:
            raise RuntimeError("step_wait without step_async")
        with self._trouble():
            if self._async:
                result = self._env.step_wait(timeout=self._timeout)
            else:
                result = self._env.step(self._pending)
        observation, reward, terminated, truncated, info = result
        first = self.is_last.copy()  # what ended with the row before begins with this one
        action, self._pending = np.where(first[:, None], np.float32(0), self._pending), None
        row = self._row(
            observation,
            action=action,
            reward=reward,
            first=first,
            terminated=terminated,
            truncated=truncated,
        )
        return row, np.asarray(info["frames"], np.int64)

    def step(self, action: np.ndarray) -> tuple[Timestep, np.ndarray]:
        self.step_async(action)
        return self.step_wait()

    def close(self) -> None:
        """End the workers; waits a few seconds for them, then kills."""
        if self._env.closed:
            return
        if not self._async:
            self._env.close()
            return
        waiting = self._pending is not None
        try:
            if waiting:  # a step is under way: its answer must be taken before "close" is sent
                self._env.step_wait(timeout=_CLOSE_SECONDS)
            self._env.close(timeout=_CLOSE_SECONDS)
        except (multiprocessing.TimeoutError, OSError, EOFError, UserError, gymnasium.error.Error):
            self._kill()

    def __enter__(self) -> VectorEnv:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _row(
        self,
        observation: dict[str, np.ndarray],
        *,
        action: np.ndarray,
        reward: np.ndarray,
        first: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> Timestep:
        self.episodes += first
        self.is_last = np.asarray(terminated | truncated, bool)
        image = observation.get("image")
        if image is not None and image.shape[1:3] != (self._size, self._size):
            # Imported here: only foreign pictures need it, and it brings torch along.
            from latentplan.runtime.torchvision_compat import resize_frames

            observation = {**observation, "image": resize_frames(image, self._size)}
        return Timestep(
            obs={name: observation[name] for name in self.spec.obs},
            prev_action=action,
            reward=np.asarray(reward, np.float32),
            is_first=first,
            is_terminal=np.asarray(terminated, bool).copy(),
        )

    @contextlib.contextmanager
    def _trouble(self) -> Iterator[None]:
        """Turn what Gymnasium raises about workers into one sentence, and end all workers."""
        level = gymnasium.logger.min_level
        # Gymnasium would show the worker's traceback too, and trip over a "%" in it.
        gymnasium.logger.min_level = gymnasium.logger.ERROR + 1
        try:
            yield
        except UserError as error:
            self._kill()
            raise UserError(f"{self._task}: {error}") from error
        except multiprocessing.TimeoutError:
            self._kill()
            raise UserError(
                f"An environment of {self._task} gave no answer for {self._timeout:g} s "
                "(env.timeout) and was ended; if it draws, env.renderer=osmesa may help."
            ) from None
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            codes = self._kill()
            raise UserError(
                f"A worker process of {self._task} died (exit codes {codes}); "
                "a negative one is a signal, -9 is usually the machine running out of memory."
            ) from error
        finally:
            gymnasium.logger.min_level = level

    def _kill(self) -> list[Any]:
        """End the workers at once; returns the exit codes of those that were gone already."""
        if not self._async:
            self._env.close()
            return []
        for process in self._env.processes:
            process.join(timeout=0.2)
        codes = [p.exitcode for p in self._env.processes if p.exitcode is not None]
        for process in self._env.processes:
            process.kill()
        for process in self._env.processes:
            process.join()
        for pipe in self._env.parent_pipes:
            if pipe is not None:
                pipe.close()
        self._env.closed = True  # or Gymnasium would talk to the dead
        return codes


def _spec_of(known: Spaces, env: EnvConfig) -> EnvSpec:
    obs: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, space in known.observation.spaces.items():
        is_image = name == "image"
        shape = (env.image_size, env.image_size, 3) if is_image else tuple(space.shape or ())
        obs[name] = (shape, "uint8" if is_image else "float32")
    bounds = known.action_low, known.action_high
    return EnvSpec(obs, known.action_dim, env.repeat, *bounds)
