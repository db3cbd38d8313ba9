"""How environments are made, and the start of processes for them.

The processes import neither torch nor the main module.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from latentplan.config.schema import EnvConfig
from latentplan.config.tasks import parse_task
from latentplan.envs import dmc, dummy, gym
from latentplan.envs.isolation import Isolation, send_output_to_stderr
from latentplan.envs.rendering import Renderer
from latentplan.envs.simulator import EpisodeEnv, Simulator, Spaces
from latentplan.types import UserError

CLOSE_SECONDS = 5.0  # after which environments that have not closed are killed


class BuildError(UserError):
    """The code of an environment failed while it was built.

    Attributes:
        mujoco: MuJoCo was imported, so that a lack of OpenGL may be the cause.
    """

    def __init__(self, sentence: str, mujoco: bool) -> None:
        super().__init__(sentence)
        self.mujoco = mujoco


@dataclass(frozen=True)
class Recipe:
    """Everything that is needed to build a task's simulator. It is sent to the workers."""

    task: str
    obs: str
    image_size: int
    module: str
    renderer: Renderer | None
    film: bool = False  # pictures for people will be drawn
    kwargs: tuple[tuple[str, Any], ...] = ()  # arguments of a Gymnasium environment
    camera: str = ""  # of a dm_control task

    def build(self) -> Simulator:
        suite, name = parse_task(self.task)
        if suite == "dmc":
            camera, film = self.camera, self.film
            return dmc.build(name, self.obs, self.image_size, self.renderer, camera, film)
        if suite == "gym":
            size, arguments = self.image_size, dict(self.kwargs)
            return gym.build(name, self.obs, self.module, size, self.renderer, arguments, self.film)
        return dummy.build(name, self.obs, self.image_size)

    def describe(self, *, begin: bool = False) -> Spaces:
        """Build the simulator in this process, and return its spaces.

        Args:
            begin: also begin an episode, because an observation may be drawn with MuJoCo.

        Raises:
            BuildError: it cannot be built, because its code failed.
            UserError: it is refused.
        """
        try:
            with contextlib.closing(self.build()) as simulator:
                if begin:
                    _begin(simulator, self.film)
                return Spaces(simulator.observation_space, simulator.actions, simulator.entries)
        except UserError:
            raise
        except Exception as error:  # simulators and users' code may raise any exception
            sentence = f"{self.task} cannot be built: {type(error).__name__}: {error}"
            raise BuildError(sentence, "mujoco" in sys.modules) from error


def _begin(simulator: Simulator, film: bool) -> None:
    """Begin an episode where MuJoCo may need a renderer for it. Others begin only in workers, where
    their faults are survived."""
    if "mujoco" in sys.modules:
        simulator.reset(seed=0, episode=0)
        if film:
            simulator.draw()


@dataclass(frozen=True)
class EnvMaker:
    """Makes one environment, in a worker or in this process."""

    recipe: Recipe
    known: Spaces
    env: EnvConfig
    seed: int
    mode: str
    index: int

    def __call__(self) -> EpisodeEnv:
        return EpisodeEnv(
            self.recipe.build,
            self.known,
            repeat=self.env.repeat,
            episode_frames=self.env.episode_frames,
            seed=self.seed,
            mode=self.mode,
            index=self.index,
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


def follow_parent() -> None:
    """Let this worker process ignore the signals of its parent's group, and end with the parent.

    Ctrl-C, timeout(1) and batch systems signal the whole process group. The parent decides what to
    do, so the worker leaves the group. It is ended with its own children when the parent has ended
    in any way, even if it hangs by then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def watch() -> None:
        connection.wait([parent.sentinel])
        time.sleep(CLOSE_SECONDS)  # in which a worker that does not hang closes its environment
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _describe_worker(recipe: Recipe, pipe: Connection) -> None:
    follow_parent()
    send_output_to_stderr()
    if recipe.renderer is None:  # what is built here must not choose a renderer by itself
        os.environ["MUJOCO_GL"] = "disabled"
    try:
        pipe.send(recipe.describe(begin=recipe.renderer is None))
    except BuildError as error:
        pipe.send((str(error), error.mujoco))
    except UserError as error:
        pipe.send((str(error), None))


# Evaluations build environments again and again. The spaces stay, and a fault while they are looked
# up would end the run.
@functools.cache
def describe_here(recipe: Recipe) -> Spaces:
    """Run `Recipe.describe` in this process."""
    with Isolation()():
        return recipe.describe()


@functools.cache
def describe_in_process(recipe: Recipe, timeout: float) -> Spaces:
    """Run `Recipe.describe` in a new process, so that this one does not import the simulator.

    Without a renderer, MuJoCo cannot draw there.

    Raises:
        BuildError, UserError: as `Recipe.describe`, or the process died or took too long.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_describe_worker, args=(recipe, theirs), daemon=True)
    with main_hidden():
        process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise UserError(f"{recipe.task} could not be built within {timeout:g} s (env.timeout).")
        answer = ours.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"The process that builds {recipe.task} died (exit code {process.exitcode})."
        ) from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(answer, Spaces):
        return answer
    sentence, mujoco = answer
    raise UserError(sentence) if mujoco is None else BuildError(sentence, mujoco)


def fails_without_opengl(recipe: Recipe, timeout: float) -> bool:
    """Whether an environment imports MuJoCo, and cannot be built and drawn while MuJoCo has no
    renderer.

    Args:
        recipe: with None as its renderer.
        timeout: seconds.

    Raises:
        UserError: as `describe_in_process`, for another reason.
    """
    try:
        describe_in_process(recipe, timeout)
    except BuildError as error:
        if not error.mujoco:
            raise
        return True
    return False
