"""The start of worker processes, which import neither torch nor the main module."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

from latentplan.config.schema import EnvConfig
from latentplan.config.tasks import parse_task
from latentplan.envs import dmc, dummy, gym
from latentplan.envs.rendering import Renderer
from latentplan.envs.simulator import EpisodeEnv, Simulator, Spaces
from latentplan.types import UserError


@dataclass(frozen=True)
class Recipe:
    """Everything that is needed to build a task's simulator. It is sent to the workers."""

    task: str
    obs: str
    image_size: int
    module: str
    renderer: Renderer | None

    def build(self) -> Simulator:
        suite, name = parse_task(self.task)
        if suite == "dmc":
            return dmc.build(name, self.obs, self.image_size, self.renderer)
        if suite == "gym":
            return gym.build(name, self.obs, self.module)
        return dummy.build(name, self.obs, self.image_size)

    def describe(self) -> Spaces:
        """Build the simulator in this process, and return its spaces.

        Raises:
            UserError: it cannot be built.
        """
        try:
            with contextlib.closing(self.build()) as simulator:
                low, high = (
                    tuple(map(float, x)) for x in (simulator.action_low, simulator.action_high)
                )
                return Spaces(simulator.observation_space, low, high)
        except UserError:
            raise
        except Exception as error:  # simulators and users' code may raise any exception
            raise UserError(
                f"{self.task} cannot be built: {type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True)
class EnvMaker:
    """Makes one environment. Gymnasium calls it in the worker, and once in the parent."""

    recipe: Recipe
    known: Spaces
    env: EnvConfig
    seed: int
    mode: str
    index: int
    first_episode: int
    parent: int  # process id

    def __call__(self) -> EpisodeEnv:
        if os.getpid() != self.parent:
            # Ctrl-C, timeout(1) and batch systems signal the whole process group. The parent
            # decides what to do, so the worker leaves the group.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if hasattr(os, "setpgrp"):
                os.setpgrp()
        return EpisodeEnv(
            self.recipe.build,
            self.known,
            repeat=self.env.repeat,
            episode_frames=self.env.episode_frames,
            seed=self.seed,
            mode=self.mode,
            index=self.index,
            first_episode=self.first_episode,
        )


@contextlib.contextmanager
def main_hidden() -> Iterator[None]:
    """Spawn workers that do not import the program's main module.

    Workers do not need it, and it may import torch. A script without ``if __name__ ==
    "__main__"`` would also run again in every worker.
    """
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__.pop(name) for name in ("__file__",) if name in main.__dict__}
    spec, main.__spec__ = getattr(main, "__spec__", None), None
    try:
        yield
    finally:
        main.__dict__.update(hidden)
        main.__spec__ = spec


def _describe_worker(recipe: Recipe, pipe: Connection) -> None:
    try:
        pipe.send((recipe.describe(), ""))
    except UserError as error:
        pipe.send((None, str(error)))


@functools.cache
def describe_in_process(recipe: Recipe, timeout: float) -> Spaces:
    """Run `Recipe.describe` in a new process, so that this one does not import the simulator."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_describe_worker, args=(recipe, theirs), daemon=True)
    with main_hidden():
        process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise UserError(f"{recipe.task} could not be built within {timeout:g} s (env.timeout).")
        known, problem = ours.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"The process that builds {recipe.task} died (exit code {process.exitcode})."
        ) from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if problem:
        raise UserError(problem)
    return known
