"""A Gymnasium environment that fails once, in its second episode, for ``tools/reliability faults``.

The environment variable ``FAULT`` names the fault. ``FAULT_FILE`` is a file that exists once the
fault has happened, so that it does not happen again in another process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import gymnasium
import numpy as np

FAULT, FAULT_FILE = os.environ.get("FAULT", ""), os.environ.get("FAULT_FILE", "")
STEP = 100  # of the process, at which the fault comes; an episode has 64
FAULTY_BUILDS = 1  # builds that fail after the fault "init"
Step = tuple[Any, Any, bool, bool, dict[str, Any]]


class Failing(gymnasium.Env):
    """A point that the action moves, and that earns most at the center."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    steps = resets = 0  # of the process

    def __init__(self, **options: Any) -> None:
        if FAULT == "init" and _happened() and _times("builds") < FAULTY_BUILDS:
            _note("builds")
            raise RuntimeError("the environment cannot be built again yet")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        Failing.resets += 1
        self.position = self.np_random.uniform(-1, 1, 2)
        if Failing.steps >= STEP // 2 and FAULT in RESET_FAULTS and _first_time():
            return RESET_FAULTS[FAULT](self)
        return self.position.astype(np.float32), {}

    def step(self, action: Any) -> Step:
        Failing.steps += 1
        self.position = np.clip(self.position + 0.1 * action, -1, 1)
        reward = float(np.exp(-2 * np.linalg.norm(self.position)))
        result: Step = (self.position.astype(np.float32), reward, False, False, {})
        if Failing.steps == STEP and FAULT in STEP_FAULTS and _first_time():
            return STEP_FAULTS[FAULT](result)
        return result


def _happened() -> bool:
    return os.path.exists(FAULT_FILE)


def _first_time() -> bool:
    """Note that the fault happens. False if it has happened before, in any process."""
    try:
        os.close(os.open(FAULT_FILE, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _times(name: str) -> int:
    path = f"{FAULT_FILE}.{name}"
    return os.path.getsize(path) if os.path.exists(path) else 0


def _note(name: str) -> None:
    with open(f"{FAULT_FILE}.{name}", "a") as file:
        file.write("x")


def _raise(error: BaseException) -> Any:
    raise error


def _recurse(result: Step) -> Step:
    return _recurse(result)


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def _orphan(result: Step) -> Step:
    """End, and leave a child that holds all handles of this process."""
    pid = os.fork()
    if pid == 0:
        time.sleep(120)
        os._exit(0)
    with open(f"{FAULT_FILE}.pid", "w") as file:
        file.write(str(pid))
    os._exit(7)


def _close_output(result: Step) -> Step:
    for stream in (1, 2):
        os.close(stream)
    return result


def _flood(result: Step) -> Step:
    """Write a megabyte to standard output, which nobody may read."""
    os.write(1, b"x" * 2**20)
    return result


STEP_FAULTS: dict[str, Any] = {
    "raise": lambda r: _raise(RuntimeError("boom")),
    "init": lambda r: _raise(RuntimeError("boom")),
    "exit": lambda r: os._exit(7),
    "sys exit": lambda r: sys.exit(3),
    "SIGKILL": lambda r: _signal(signal.SIGKILL),
    "SIGSEGV": lambda r: _signal(signal.SIGSEGV),
    "SIGSTOP": lambda r: _signal(signal.SIGSTOP),
    "hang": lambda r: time.sleep(100_000),
    "NaN observation": lambda r: (np.full(2, np.nan, np.float32), *r[1:]),
    "inf observation": lambda r: (np.full(2, np.inf, np.float32), *r[1:]),
    "NaN reward": lambda r: (r[0], float("nan"), *r[2:]),
    "inf reward": lambda r: (r[0], float("inf"), *r[2:]),
    "reward beyond float32": lambda r: (r[0], 1e39, *r[2:]),
    "reward of another type": lambda r: (r[0], "many", *r[2:]),
    "wrong shape": lambda r: (np.zeros(3, np.float32), *r[1:]),
    "wrong dtype": lambda r: (np.array(["a", "b"]), *r[1:]),
    "three values": lambda r: r[:3],
    "None": lambda r: None,
    "KeyboardInterrupt": lambda r: _raise(KeyboardInterrupt()),
    "MemoryError": lambda r: _raise(MemoryError()),
    "RecursionError": _recurse,
    "error that cannot be pickled": lambda r: _raise(type("Local", (Exception,), {})("boom")),
    "huge message with %": lambda r: _raise(RuntimeError("100 %s %d %(x)s {0} " * 50_000)),
    "orphan": _orphan,
    "closed output": _close_output,
    "flood of output": _flood,
}
RESET_FAULTS: dict[str, Any] = {
    "raise in reset": lambda env: _raise(RuntimeError("boom")),
    "None from reset": lambda env: None,
    "hang in reset": lambda env: time.sleep(100_000),
}
FAULTS = (*STEP_FAULTS, *RESET_FAULTS)
# The environment goes on after these, so that a run may count no fault.
HARMLESS = ("closed output", "flood of output")
if "Failing-v0" not in gymnasium.registry:
    gymnasium.register("Failing-v0", Failing)
