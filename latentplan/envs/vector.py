"""Several environments that step together, in worker processes or in this process.

An environment that has ended is reset on the next step, so that the last observation of an episode
is an ordinary row. Rows are aligned as in `latentplan.types`. An environment that fails loses its
episode and is built anew, while the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection

import numpy as np

from latentplan.config.schema import EnvConfig
from latentplan.envs.actions import executed
from latentplan.envs.faults import Fault, FaultPolicy
from latentplan.envs.observations import tell_what_is_used
from latentplan.envs.processes import DRAW, Answer, InProcessEnv, WorkerEnv
from latentplan.envs.simulator import Outcome, Picture, Spaces, episode_seed
from latentplan.envs.workers import (
    CLOSE_SECONDS,
    EnvMaker,
    Recipe,
    describe_here,
    describe_in_process,
)
from latentplan.types import EnvSpec, Timestep, UserError

_STOP_SECONDS = 3.0  # that a step may still take after a request to stop
_FAULT_SECONDS = 0.5  # in which environments may close after a fault
_POLL_SECONDS = 0.2  # between looks at that request


class StepInterruptedError(Exception):
    """A step was given up because of a request to stop. All workers are ended."""


def _never() -> bool:
    return False


class VectorEnv:
    """``num_envs`` environments of one task; N = num_envs.

    `step` returns ``(row, frames)``: a numpy `Timestep` (N, ...), aligned as in `latentplan.types`,
    and the frames (N,) that each decision used. The row after the end of an episode begins the next
    episode: its action is ignored, and its frames are 0. Use the object as a context manager, or
    `close` it.

    An environment that raises, dies, hangs or returns wrong values is built anew, and its row
    begins the next episode. The row before it is then the last one of an episode that was cut.
    `reset` and the methods that step raise `UserError` if the environments cannot be used, and
    `TooManyFaultsError` after ``env.max_faults`` faults; all environments are ended then.

    Attributes:
        num_envs: N.
        spec: the observations and actions.
        episodes: (N,) int64 episodes that were begun so far, with those of earlier sessions.
        numbers: (N,) int64, the number of the present episode of each environment. In training,
            every environment counts its own episodes. In evaluation they take the next number from
            one sequence, so that episode k is the same for any number of environments.
        seeds: (N,) int64, the seed of the present episode of each environment.
        is_last: (N,) bool, whether the last row ended its episode. It is False for an episode that
            was cut by a fault.
        success: whether the last decision of each environment was a success, by ``env.success``;
            None: the task says nothing.
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
        self.episodes = np.array(first_episodes or [0] * num_envs, np.int64)
        self.is_last = np.zeros(num_envs, bool)
        self.numbers, self.seeds = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)
        self.success: list[bool | None] = [None] * num_envs
        self._timeout, self._size = env.timeout, env.image_size
        self._by_reward = env.success == "reward"
        in_process = env.workers and not recipe.task.startswith("dummy:")
        known = describe_in_process(recipe, env.timeout) if in_process else describe_here(recipe)
        self.spec = _spec_of(known, env)
        tell_what_is_used(recipe.task, known.entries)
        # A second episode of an earlier session, or a trained agent, tells that the task works.
        worked = mode == "eval" or bool((self.episodes > 1).any())
        self._policy = FaultPolicy(recipe.task, num_envs, env.max_faults, worked=worked)
        self._together = mode == "eval"  # the episodes have one sequence of numbers
        self._makers = [
            EnvMaker(recipe, known, env, seed, mode, 0 if self._together else i)
            for i in range(num_envs)
        ]
        self._kind: type[InProcessEnv | WorkerEnv] = WorkerEnv if env.workers else InProcessEnv
        self._pending: np.ndarray | None = None
        self._envs: list[InProcessEnv | WorkerEnv] = []
        try:
            for make in self._makers:
                self._envs.append(self._kind(make))
        except BaseException:
            self._end(_FAULT_SECONDS)
            raise

    @property
    def faults(self) -> int:
        """The number of faults so far."""
        return self._policy.count

    def reset(self, stopping: Callable[[], bool] = _never) -> tuple[Timestep, np.ndarray]:
        """Begin an episode in every environment; return its rows and zero frames (N,).

        ``stopping`` and the errors are those of `step_wait`.
        """
        self._check_open()
        for i in range(self.num_envs):
            self._begin(i)
        action = np.zeros((self.num_envs, self.spec.action_dim), np.float32)
        return self._receive(action, np.ones(self.num_envs, bool), stopping)

    def step_async(self, action: np.ndarray) -> None:
        """Send actions (N, A) in [-1, 1] to the workers, and return before they have finished.

        Raises:
            ValueError: the actions are not finite or have another shape.
        """
        self._check_open()
        action = np.asarray(action, np.float32)
        shape = (self.num_envs, self.spec.action_dim)
        if action.shape != shape or not np.isfinite(action).all():
            raise ValueError(f"actions must be finite and of shape {shape}, got {action!r}")
        self._pending = executed(action, self.spec.action_groups)
        for i, env in enumerate(self._envs):
            if self.is_last[i]:
                self._begin(i)
            else:
                env.send(self._pending[i])

    def step_wait(self, stopping: Callable[[], bool] = _never) -> tuple[Timestep, np.ndarray]:
        """The rows after the actions that were sent, and the frames (N,) that were used.

        Args:
            stopping: whether a stop is requested. Then hanging workers are not waited for.

        Raises:
            RuntimeError: no actions were sent.
            UserError: the environments cannot be used, or had too many faults.
            StepInterruptedError: a stop was requested, and a worker did not answer.
        """
        if self._pending is None:
            raise RuntimeError("step_wait without step_async")
        action, self._pending = self._pending, None
        return self._receive(action, self.is_last.copy(), stopping)

    def step(self, action: np.ndarray) -> tuple[Timestep, np.ndarray]:
        """:meth:`step_async` and :meth:`step_wait` together."""
        self.step_async(action)
        return self.step_wait()

    def draw(self, i: int) -> Picture:
        """The present scene of environment i, as people look at it, for any observations.

        The environments must have been made for films (``film``, see `make_vector`).

        Raises:
            UserError: the task cannot be drawn.
        """
        self._check_open()
        self._envs[i].send(DRAW)
        answer = self._answers([i], _never)[i]
        if isinstance(answer, Picture):
            return answer
        assert isinstance(answer, Fault)  # a drawing has no other answer
        raise UserError(answer.sentence)

    def close(self) -> None:
        """End the environments; workers that have not ended after a few seconds are killed."""
        self._end(CLOSE_SECONDS)

    def __enter__(self) -> VectorEnv:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._envs:
            raise RuntimeError("the environments are closed")
        if self._pending is not None:
            raise RuntimeError("step_wait must receive the actions that were sent")

    def _begin(self, i: int) -> None:
        """Let environment i begin its next episode."""
        number = int(self.episodes.sum() if self._together else self.episodes[i])
        maker = self._makers[i]
        self.numbers[i] = number
        self.seeds[i] = episode_seed(maker.seed, maker.mode, maker.index, number)
        self._envs[i].send(number)
        self.episodes[i] += 1

    def _receive(
        self, action: np.ndarray, first: np.ndarray, stopping: Callable[[], bool]
    ) -> tuple[Timestep, np.ndarray]:
        """The row and the frames (N,) after the commands that were sent.

        Args:
            action: (N, A) the actions that were sent.
            first: (N,) the environments that begin an episode. Those that fail are added.
            stopping: as in `step_wait`.
        """
        outcomes: dict[int, Outcome] = {}
        try:
            while len(outcomes) < self.num_envs:
                waiting = [i for i in range(self.num_envs) if i not in outcomes]
                for i, answer in self._answers(waiting, stopping).items():
                    if isinstance(answer, Outcome):
                        outcomes[i] = answer
                    elif isinstance(answer, Fault):
                        first[i] = True
                        self._rebuild(i, answer)
        except BaseException:
            self._end(_FAULT_SECONDS)
            raise
        return self._row([outcomes[i] for i in range(self.num_envs)], action, first)

    def _answers(self, waiting: Iterable[int], stopping: Callable[[], bool]) -> dict[int, Answer]:
        """The answers of the environments in ``waiting``; one that hangs gives a fault."""
        answers: dict[int, Answer] = {}
        if self._kind is InProcessEnv:
            return {i: self._envs[i].receive() for i in waiting}
        sources = {source: i for i in waiting for source in self._envs[i].sources}
        end, end_of_stop = time.monotonic() + self._timeout, float("inf")
        while sources and (now := time.monotonic()) < end:
            if stopping():
                end_of_stop = min(end_of_stop, now + _STOP_SECONDS)
            if now >= end_of_stop:
                raise StepInterruptedError
            for source in connection.wait(list(sources), timeout=_POLL_SECONDS):
                if (i := sources[source]) not in answers:
                    answers[i] = self._envs[i].receive()
            sources = {source: i for source, i in sources.items() if i not in answers}
        hang = Fault(
            f"The environment did not answer for {self._timeout:g} s (env.timeout) and was ended. "
            "If it draws images, env.renderer=osmesa may help.",
            "hang",
        )
        return answers | dict.fromkeys(sources.values(), hang)

    def _rebuild(self, i: int, fault: Fault) -> None:
        """Build environment i anew after a fault, and let it begin its next episode.

        Raises:
            UserError: the environments cannot be used, or had too many faults.
        """
        self._policy.add(fault, i, int(self.episodes.sum()))
        self._envs[i].end(_FAULT_SECONDS)
        self._envs[i] = self._kind(self._makers[i])
        self._begin(i)

    def _row(
        self, outcomes: Sequence[Outcome], action: np.ndarray, first: np.ndarray
    ) -> tuple[Timestep, np.ndarray]:
        terminated = np.array([x.terminated for x in outcomes])
        self.is_last = terminated | np.array([x.truncated for x in outcomes])
        self.success = [x.reward > 0 if self._by_reward else x.success for x in outcomes]
        if self.is_last.any():
            self._policy.episode_ended()
        obs = {name: np.stack([x.observation[name] for x in outcomes]) for name in self.spec.obs}
        image = obs.get("image")
        if image is not None and image.shape[1:3] != (self._size, self._size):
            # Only images of another size need this, and it imports torch.
            from latentplan.runtime.torchvision_compat import resize_frames

            obs["image"] = resize_frames(image, self._size)
        row = Timestep(
            obs=obs,
            prev_action=np.where(first[:, None], np.float32(0), action),
            reward=np.array([x.reward for x in outcomes], np.float32),
            is_first=first,
            is_terminal=terminated,
        )
        return row, np.array([x.frames for x in outcomes], np.int64)

    def _end(self, seconds: float) -> None:
        """End all environments; workers are killed after ``seconds``."""
        deadline = time.monotonic() + seconds
        for env in self._envs:
            env.disconnect()
        for env in self._envs:
            env.end(max(0.0, deadline - time.monotonic()))
        self._envs = []
        self._pending = None


def _spec_of(known: Spaces, env: EnvConfig) -> EnvSpec:
    obs: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, space in known.observation.spaces.items():
        is_image = name == "image"
        shape = (env.image_size, env.image_size, 3) if is_image else tuple(space.shape or ())
        obs[name] = (shape, "uint8" if is_image else "float32")
    actions = known.actions
    return EnvSpec(
        obs,
        actions.dim,
        env.repeat,
        actions.low,
        actions.high,
        actions.shape,
        actions.dtype,
        known.entries,
        actions.groups,
        actions.names,
    )
