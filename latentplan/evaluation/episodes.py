"""Whole episodes of an agent, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.envs import Renderer, VectorEnv, make_eval_env
from latentplan.envs.simulator import Picture
from latentplan.types import Timestep

MOST_ENVS = 10  # environments without images that are evaluated at once in this process
Watch = Callable[[Timestep], object]  # called with every row (N) of the environments
# What a film shows of environment 0, whose newest row is in the row (N). None: there is no picture.
Camera = Callable[[VectorEnv, Timestep], Picture | None]
_NONE: Mapping[str, Any] = MappingProxyType({})


class Episode(NamedTuple):
    """The result of one episode."""

    reward: float  # the return, undiscounted
    frames: int
    success: bool | None  # whether the task called any frame a success; None: it says nothing


class Film(NamedTuple):
    """The pictures of one whole episode."""

    frames: list[np.ndarray]  # T pictures (h, w, 3) uint8, one per row
    fps: float  # pictures per second of simulated time


class Scores(NamedTuple):
    """The result of evaluation episodes."""

    returns: list[float]  # per episode, undiscounted
    lengths: list[int]  # frames per episode
    successes: list[bool] | None  # per episode; None where the task says nothing about success
    faults: int  # of the environments; each has cut an episode, which is not counted
    film: Film | None  # of the first whole episode of environment 0

    @property
    def mean(self) -> float:
        """The mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """The standard deviation of the returns."""
        return float(np.std(self.returns))


class _Tally:
    """Adds up the episodes of N environments, by the numbers of the episodes."""

    def __init__(self, num_envs: int) -> None:
        self._number = [-1] * num_envs  # of the present episode of each environment
        self._episodes: dict[int, Episode] = {}  # that have begun and were not cut
        self._open: set[int] = set()  # those of them that have not ended

    def add(self, env: VectorEnv, row: Timestep, frames: np.ndarray) -> None:
        """Count the newest row of ``env``."""
        for i in range(env.num_envs):
            if row.is_first[i]:
                if self._number[i] in self._open:  # a fault has cut this episode
                    self._open.remove(self._number[i])
                    del self._episodes[self._number[i]]
                self._number[i] = int(env.numbers[i])
                self._episodes[self._number[i]] = Episode(0.0, 0, None)
                self._open.add(self._number[i])
            sofar, success = self._episodes[self._number[i]], env.success[i]
            self._episodes[self._number[i]] = Episode(
                sofar.reward + float(row.reward[i]),
                sofar.frames + int(frames[i]),
                sofar.success if success is None else success or bool(sofar.success),
            )
            if env.is_last[i]:
                self._open.discard(self._number[i])

    def first(self, count: int) -> list[Episode] | None:
        """The episodes with the ``count`` lowest numbers, when all of them have ended."""
        numbers = sorted(self._episodes)[:count]
        if len(numbers) < count or not self._open.isdisjoint(numbers):
            return None
        return [self._episodes[number] for number in numbers]


class _Recorder:
    """Collects the pictures of the first whole episode of environment 0."""

    def __init__(self, camera: Camera | None) -> None:
        self._camera, self._frames, self._seconds = camera, [], 1.0
        self.film: Film | None = None

    _frames: list[np.ndarray]

    def add(self, env: VectorEnv, row: Timestep) -> None:
        """Take the picture of a row (N)."""
        if self._camera is None:
            return
        if row.is_first[0]:
            self._frames.clear()  # a fault has cut the episode
        picture = self._camera(env, row)
        if picture is None:
            self._camera = None
            return
        self._frames.append(picture.image)
        if env.is_last[0]:
            self._camera, self.film = None, Film(self._frames, 1 / picture.seconds)


def run_episodes(
    agent: Agent,
    env: VectorEnv,
    episodes: int,
    mode: str = "mean",
    *,
    batch: int = 0,
    watch: Watch | None = None,
    camera: Camera | None = None,
) -> Scores:
    """Play whole episodes. The random generators of the caller do not change.

    The episodes with the lowest numbers count (`VectorEnv.numbers`), and not those that end first,
    which would be the short ones. An episode that a fault of the environment has cut is not
    counted, and another one is played. The randomness of an episode comes from its own seed, so its
    score depends neither on the number of episodes nor on that of environments, up to the rounding
    of products over another number of rows. With the same ``batch`` there is no rounding either.

    Args:
        agent: the agent.
        env: N environments of the mode ``eval``.
        episodes: the number of episodes that are counted.
        mode: ``mean``, ``sample`` or ``planner``, as in :meth:`Agent.act`.
        batch: rows on which the agent acts, at least N. Further rows repeat the last one, and their
            actions are not used. 0: N rows.
        watch: called with every row (N) of the environments.
        camera: what a film shows of environment 0.

    Raises:
        TooManyFaultsError: the environments had ``env.max_faults`` faults.
        UserError: the camera cannot draw.
    """
    device, count = agent.device, max(batch, env.num_envs)
    padded = np.minimum(np.arange(count), env.num_envs - 1)
    generators = [torch.Generator(device) for _ in range(count)]
    tally, recorder = _Tally(env.num_envs), _Recorder(camera)
    row, frames = env.reset()
    carry = agent.initial(count)
    while True:
        for i in np.flatnonzero(row.is_first):
            generators[i].manual_seed(int(env.seeds[i]))
        if watch is not None:
            watch(row)
        recorder.add(env, row)
        tally.add(env, row, frames)
        played = tally.first(episodes)
        if played is not None:
            break
        seen = row.map(lambda x: x[padded]).to(device)
        action, carry = agent.act(seen, carry, mode, generators)
        row, frames = env.step(action[: env.num_envs].cpu().numpy())
    successes = [bool(x.success) for x in played if x.success is not None]
    return Scores(
        [x.reward for x in played],
        [x.frames for x in played],
        successes if len(successes) == len(played) else None,
        env.faults,
        recorder.film,
    )


def score(
    agent: Agent,
    config: Config,
    renderer: Renderer | None,
    modes: Sequence[str],
    episodes: int,
    seed: int,
    *,
    watch: Mapping[str, Watch] = _NONE,
    cameras: Mapping[str, Camera] = _NONE,
    draws: bool = False,
) -> Iterator[tuple[str, Scores]]:
    """Score every mode of acting on the same episodes.

    Args:
        agent: the agent.
        config: the configuration of the run.
        renderer: the renderer of the environments, or None if no images are drawn.
        modes: modes of :func:`run_episodes`.
        episodes: the number of episodes per mode.
        seed: the seed of the episodes, as in :func:`make_eval_env`.
        watch, cameras: by mode, as of :func:`run_episodes`.
        draws: whether the cameras call :meth:`VectorEnv.draw`.
    """
    # Many vectors are filtered as fast as one. Images take memory, and time to draw.
    in_process = 1 if agent.world.spec.images else MOST_ENVS
    batch = 2 if config.env.workers else in_process
    for mode in modes:
        count, watcher, camera = min(episodes, batch), watch.get(mode), cameras.get(mode)
        film = draws and camera is not None
        # An environment never repeats an episode, so every mode needs new environments.
        with make_eval_env(config, renderer, count, seed, film) as env:
            scores = run_episodes(
                agent, env, episodes, mode, batch=batch, watch=watcher, camera=camera
            )
        yield mode, scores
