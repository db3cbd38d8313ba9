"""Where one environment runs: in a worker process, or in this process.

Both kinds take a command and give an answer. A command is the number of an episode, which begins,
an action (A,), or ``DRAW``. An answer is an `Outcome`, a `Picture`, or the `Fault` that prevented
it.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from gymnasium.vector.utils import clear_mpi_env_vars

from latentplan.envs.faults import Fault, fault_of
from latentplan.envs.isolation import Isolation, send_output_to_stderr
from latentplan.envs.simulator import EpisodeEnv, Outcome, Picture, Spaces
from latentplan.envs.workers import EnvMaker, follow_parent, main_hidden

DRAW = "draw"
Command = int | np.ndarray | str
Answer = Outcome | Picture | Fault


def _answer(env: EpisodeEnv, command: Command) -> Answer:
    try:
        if isinstance(command, str):
            return env.draw()
        return env.reset(command) if isinstance(command, int) else env.step(command)
    except (Exception, SystemExit) as error:  # environments may raise any exception
        return fault_of(error)


def _serve(make: EnvMaker, memory: Mapping[str, Any], pipe: Connection) -> None:
    """Answer commands until the parent closes its end of the pipe. This runs in the worker.

    Args:
        make: makes the environment.
        memory: shared memory for the observation, by its names.
        pipe: gives commands and takes answers, whose observations are empty.
    """
    follow_parent()
    send_output_to_stderr()
    env, shared = make(), _arrays(memory, make.known)
    with contextlib.suppress(EOFError, OSError), contextlib.closing(env):
        while True:
            answer = _answer(env, pipe.recv())
            if isinstance(answer, Outcome):
                for name, x in answer.observation.items():
                    shared[name][...] = x
                answer = answer._replace(observation={})
            pipe.send(answer)


def _arrays(memory: Mapping[str, Any], known: Spaces) -> dict[str, np.ndarray]:
    """The observation in shared memory, by its names."""
    observation = known.observation.spaces
    return {
        name: np.ndarray(observation[name].shape or (), observation[name].dtype, buffer)
        for name, buffer in memory.items()
    }


class InProcessEnv:
    """An environment in this process. A hang of it is not noticed."""

    def __init__(self, make: EnvMaker) -> None:
        self._env = make()
        users_code = make.recipe.task.startswith("gym:")
        self._isolated = Isolation() if users_code else contextlib.nullcontext
        self._command: Command = 0
        self.sources: tuple[Any, ...] = ()

    def send(self, command: Command) -> None:
        """Keep a command. `receive` carries it out."""
        self._command = command

    def receive(self) -> Answer:
        """Carry out the command, and return its answer."""
        with self._isolated():
            return _answer(self._env, self._command)

    def disconnect(self) -> None:
        """Do nothing: there is no other process."""

    def end(self, seconds: float) -> None:
        """Close the environment. ``seconds`` is ignored."""
        # An environment that failed may fail here again.
        with contextlib.suppress(Exception), self._isolated():
            self._env.close()


class WorkerEnv:
    """An environment in a process of its own, which starts while this one goes on.

    Observations are in shared memory, because images are large and a pipe is slow. The arrays of an
    answer change when the next command is sent.

    Attributes:
        sources: objects for ``multiprocessing.connection.wait``; one of them becomes ready when
            there is an answer, or when the process has ended.
        process: the worker.
    """

    def __init__(self, make: EnvMaker) -> None:
        context = multiprocessing.get_context("spawn")
        memory = {
            name: context.RawArray(
                "B", math.prod(space.shape or ()) * np.dtype(space.dtype).itemsize
            )
            for name, space in make.known.observation.spaces.items()
        }
        self._observation = _arrays(memory, make.known)
        self._ended = False
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, memory, theirs), daemon=True)
        try:
            with main_hidden(), clear_mpi_env_vars():
                self.process.start()
        except BaseException:
            self._pipe.close()
            raise
        finally:
            theirs.close()
        self.sources: Sequence[Any] = (self._pipe, self.process.sentinel)

    def send(self, command: Command) -> None:
        """Send a command. If the process has ended, `receive` tells."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send(command)

    def receive(self) -> Answer:
        """The answer, or the fault that the process has ended. One of ``sources`` must be ready."""
        try:
            if self._pipe.poll():
                answer: Answer = self._pipe.recv()
                if isinstance(answer, Outcome):
                    return answer._replace(observation=self._observation)
                return answer
        except (EOFError, OSError):  # OSError: the process died in the middle of a message
            pass
        connection.wait([self.process.sentinel], timeout=1.0)
        self._kill_group()
        self.process.join()
        code = self.process.exitcode
        return Fault(
            f"Its worker process died (exit code {code}). A negative code is a signal; -9 usually "
            "means that the machine had no memory left.",
            f"died {code}",
        )

    def disconnect(self) -> None:
        """Let the worker close its environment and end, which it does unless it hangs."""
        self._pipe.close()

    def end(self, seconds: float) -> None:
        """Wait until the process ends, and kill it with its children after ``seconds``.

        It may be called again, for example where building the environment anew has failed.
        """
        if self._ended:
            return
        self.disconnect()
        connection.wait([self.process.sentinel], timeout=seconds)
        self._kill_group()
        self.process.kill()
        self.process.join()
        self._ended = True
        self.process.close()

    def _kill_group(self) -> None:
        """Kill the process and its children, which may outlive it. It leads a group of its own."""
        if hasattr(os, "killpg") and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
