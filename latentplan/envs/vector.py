"""Several environments that step together, in worker processes or in this process.

This module builds on Gymnasium's vector environments, which reset on the next step, so that the
last observation of an episode is an ordinary row. It adds rows that are aligned as in
`latentplan.types`, clear errors when a worker hangs or ends, and workers that end with their owner.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from latentplan.config.schema import EnvConfig
from latentplan.envs.simulator import Spaces
from latentplan.envs.workers import EnvMaker, Recipe, describe_in_process, main_hidden
from latentplan.types import EnvSpec, Timestep, UserError

_CLOSE_SECONDS = 5.0  # after which workers that have not ended are killed
_STOP_SECONDS = 3.0  # that a step may still take after a request to stop
_POLL_SECONDS = 0.2  # between looks at that request


class StepInterruptedError(Exception):
    """A step was given up because of a request to stop. All workers are ended."""


class VectorEnv:
    """``num_envs`` environments of one task; N = num_envs.

    `step` returns ``(row, frames)``: a numpy `Timestep` (N, ...), aligned as in `latentplan.types`,
    and the frames (N,) that each decision used. The row after the end of an episode begins the next
    episode: its action is ignored, and its frames are 0. Use the object as a context manager, or
    `close` it. If a worker hangs, ends or fails, all workers are ended and `UserError` is raised.
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
        self.is_last = np.zeros(num_envs, bool)  # whether the last row ended its episode
        self._task, self._timeout, self._size = recipe.task, env.timeout, env.image_size
        in_process = env.workers and not recipe.task.startswith("dummy:")
        known = describe_in_process(recipe, env.timeout) if in_process else recipe.describe()
        self.spec = _spec_of(known, env)
        makers = [
            EnvMaker(recipe, known, env, seed, mode, i, int(self.episodes[i]), os.getpid())
            for i in range(num_envs)
        ]
        self._pending: np.ndarray | None = None
        self._async = env.workers
        if env.workers:
            self._env: Any = self._start(makers)  # Gymnasium's two classes have different methods
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
                f"A worker process of {self._task} ended while it started; the program may have "
                "been changed during the run."
            ) from error

    def reset(self) -> tuple[Timestep, np.ndarray]:
        """Begin an episode in every environment; return its rows and zero frames (N,)."""
        with self._errors_explained():
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
        """Send actions (N, A) in [-1, 1] to the workers, and return before they have finished.

        Raises:
            ValueError: the actions are not finite or have another shape.
        """
        action = np.asarray(action, np.float32)
        shape = (self.num_envs, self.spec.action_dim)
        if action.shape != shape or not np.isfinite(action).all():
            raise ValueError(f"actions must be finite and of shape {shape}, got {action!r}")
        self._pending = np.clip(action, -1.0, 1.0)
        if self._async:
            with self._errors_explained():
                self._env.step_async(self._pending)

    def step_wait(
        self, stopping: Callable[[], bool] = lambda: False
    ) -> tuple[Timestep, np.ndarray]:
        """The rows after the actions that were sent, and the frames (N,) that were used.

        Args:
            stopping: whether a stop is requested. Then hanging workers are not waited for.

        Raises:
            RuntimeError: no actions were sent.
            UserError: an environment failed.
            StepInterruptedError: a stop was requested, and a worker did not answer.
        """
        if self._pending is None:
            raise RuntimeError("step_wait without step_async")
        with self._errors_explained():
            if self._async:
                result = self._env.step_wait(timeout=self._await_answers(stopping))
            else:
                result = self._env.step(self._pending)
        observation, reward, terminated, truncated, info = result
        first = self.is_last.copy()  # an episode begins where the last row ended one
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

    def _await_answers(self, stopping: Callable[[], bool]) -> float:
        """Wait until all workers have answered or the timeout has passed. Returns what is left."""
        end, end_of_stop = time.monotonic() + self._timeout, float("inf")
        waiting = list(self._env.parent_pipes)
        while waiting and (now := time.monotonic()) < end:
            if stopping():
                end_of_stop = min(end_of_stop, now + _STOP_SECONDS)
            if now >= end_of_stop:
                self._kill()
                raise StepInterruptedError
            ready = connection.wait(waiting, timeout=_POLL_SECONDS)
            waiting = [pipe for pipe in waiting if pipe not in ready]
        return max(0.0, end - time.monotonic())

    def step(self, action: np.ndarray) -> tuple[Timestep, np.ndarray]:
        """:meth:`step_async` and :meth:`step_wait` together."""
        self.step_async(action)
        return self.step_wait()

    def close(self) -> None:
        """End the workers; those that have not ended after a few seconds are killed."""
        if self._env.closed:
            return
        if not self._async:
            self._env.close()
            return
        waiting = self._pending is not None
        try:
            if waiting:  # the answer of a step must be received before "close" is sent
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
            # Only images of another size need this, and it imports torch.
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
    def _errors_explained(self) -> Iterator[None]:
        """Turn Gymnasium's errors about workers into one sentence, and end all workers."""
        level = gymnasium.logger.min_level
        # Gymnasium would also log the worker's traceback, and fail at a "%" in it.
        gymnasium.logger.min_level = gymnasium.logger.ERROR + 1
        try:
            yield
        except UserError as error:
            self._kill()
            raise UserError(f"{self._task}: {error}") from error
        except multiprocessing.TimeoutError:
            self._kill()
            raise UserError(
                f"An environment of {self._task} did not answer for {self._timeout:g} s "
                "(env.timeout) and was ended. If it draws images, env.renderer=osmesa may help."
            ) from None
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            codes = self._kill()
            raise UserError(
                f"A worker process of {self._task} died (exit codes {codes}). A negative code is a "
                "signal; -9 usually means that the machine had no memory left."
            ) from error
        finally:
            gymnasium.logger.min_level = level

    def _kill(self) -> list[Any]:
        """End the workers at once; return the exit codes of those that had ended before."""
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
        self._env.closed = True  # so that Gymnasium sends nothing to workers that have ended
        return codes


def _spec_of(known: Spaces, env: EnvConfig) -> EnvSpec:
    obs: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, space in known.observation.spaces.items():
        is_image = name == "image"
        shape = (env.image_size, env.image_size, 3) if is_image else tuple(space.shape or ())
        obs[name] = (shape, "uint8" if is_image else "float32")
    bounds = known.action_low, known.action_high
    return EnvSpec(obs, known.action_dim, env.repeat, *bounds)
