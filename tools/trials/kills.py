"""SIGKILL during training: the run resumes, loses little, and ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentplan.data.files import CURSOR
from latentplan.runs import checkpoint
from trials import forked
from trials.report import Result
from trials.small_run import EPISODE, WRAPPED, digest, open_for_training, train_until

EPISODES = 24  # of a complete run, after those that fill the ring
INTERVAL = 0.2  # seconds between checkpoints
# The end of the episode under way, and the write itself, may take this long on a busy machine.
SLACK = 10.0
LONGEST = 2.5  # seconds until a kill at a random time
LONGEST_IN_WRITE = 0.012  # seconds that a kill waits after the write of a checkpoint has begun
SESSION_SECONDS = 300.0
FASTER = f"log.checkpoint_seconds={INTERVAL}"


class _EndedError(Exception):
    """A session has ended before its kill."""

    def __init__(self, status: int) -> None:
        super().__init__(forked.describe(status))
        self.failed = status != 0


def run(folder: Path, count: int, seed: int, episodes: int = EPISODES) -> Result:
    """Kill sessions of small runs until there were ``count`` kills.

    Each chain of kills begins with the same run, whose ring has wrapped, and ends when a session
    reaches the last frame, or with the last kill. Its final state is compared with that of a run
    without kills.
    """
    rng = random.Random(seed)
    base, whole, frames = folder / "base", folder / "whole", WRAPPED + episodes * EPISODE
    forked.must(partial(train_until, base, WRAPPED, f"seed={seed}"), folder / "log.txt")
    shutil.copytree(base, whole)
    forked.must(partial(train_until, whole, frames, FASTER, f"seed={seed}"), folder / "log.txt")
    expected = _final_state(whole)
    counts: Counter[str] = Counter()
    lost: list[tuple[float, int]] = []  # seconds and rows of each kill
    wrong: list[str] = []
    while counts["kills"] < count and not wrong:
        chain = folder / f"chain{counts['chains']}"
        shutil.copytree(base, chain)
        train = partial(train_until, chain, frames, FASTER, f"seed={seed}")
        while counts["kills"] < count:
            try:
                outcome = _session(chain, train, rng, folder)
            except _EndedError as error:
                if error.failed:  # else it has reached the last frame
                    log = (folder / "log.txt").read_text(errors="replace")
                    wrong.append(f"a killed run does not go on: {error}; {log[-500:]}")
                break
            counts.update(["kills", *outcome["where"]])
            lost.append((outcome["seconds"], outcome["rows"]))
            wrong += _mistakes(chain, outcome)
        wrong += _finish(chain, train, folder, expected)
        counts["chains"] += 1
        shutil.rmtree(chain)
    return Result(
        fault="SIGKILL during training, with a wrapped replay",
        tried=counts["kills"],
        outcomes={
            **counts,
            "most seconds lost": round(max((x[0] for x in lost), default=0.0), 2),
            "most rows lost": max((x[1] for x in lost), default=0),
        },
        wrong=wrong,
        summary=f"{counts['kills']} kills in {counts['chains']} chains ({counts['in a write']} "
        f"inside the write of a checkpoint): {len(wrong)} wrong outcomes",
    )


def _session(
    chain: Path, train: Callable[[], None], rng: random.Random, folder: Path
) -> dict[str, Any]:
    """Train on and kill.

    Raises:
        _EndedError: the session has ended before its kill.
    """
    path = chain / "checkpoint.pt"
    before, begun = _frames(chain), time.time()
    pid = forked.start(train, folder / "log.txt")
    longest = LONGEST
    if rng.random() < 0.5:
        _await_write(pid, path.with_name("checkpoint.pt.tmp"), skip=rng.randrange(3))
        longest = LONGEST_IN_WRITE
    _sleep(pid, rng.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):  # It ended between the last look and the kill.
        raise _EndedError(status)
    killed = time.time()
    saved = path if path.exists() else checkpoint.former_path(path)
    where = ["in a write"] if path.with_name("checkpoint.pt.tmp").exists() else []
    where += ["between renames"] if not path.exists() else []
    rows = int(np.fromfile(chain / "replay" / "counters.bin", np.int64)[CURSOR])
    kept = checkpoint.load(saved)["replay"]["cursor"]
    return {
        "where": where,
        "before": before,
        "seconds": killed - max(begun, saved.stat().st_mtime),
        "rows": rows - kept,
    }


def _await_write(pid: int, temporary: Path, skip: int) -> None:
    """Wait until the write of a checkpoint begins, after some complete ones.

    Raises:
        _EndedError: the process has ended.
    """
    for remaining in range(skip, -1, -1):
        while not temporary.exists():
            _sleep(pid, 0.0005)
        while remaining and temporary.exists():
            _sleep(pid, 0.0005)


def _sleep(pid: int, seconds: float) -> None:
    """Sleep.

    Raises:
        _EndedError: the process has ended. It is reaped.
    """
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            raise _EndedError(status)
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, 0.05))


def _mistakes(chain: Path, outcome: dict[str, Any]) -> list[str]:
    """What is wrong after a kill."""
    wrong = []
    if outcome["seconds"] > INTERVAL + SLACK:
        wrong.append(f"{outcome['seconds']:.1f} s lost with a checkpoint every {INTERVAL} s")
    if _frames(chain) < outcome["before"]:
        wrong.append(f"back from frame {outcome['before']} to {_frames(chain)}")
    return wrong


def _finish(
    chain: Path, train: Callable[[], None], folder: Path, expected: dict[str, str]
) -> list[str]:
    """Train a chain to its last frame, and compare it with the run without kills."""
    answer = forked.call(train, folder / "log.txt", SESSION_SECONDS)
    if answer.trouble:
        return [f"a killed run does not go on: {answer.trouble}; {answer.log[-500:]}"]
    state = _final_state(chain)
    differing = [name for name in expected if state[name] != expected[name]]
    return [f"differs from the run without kills: {', '.join(differing)}"] if differing else []


def _frames(chain: Path) -> int:
    return checkpoint.load_newest(chain / "checkpoint.pt")["frames"]


def _final_state(run_folder: Path) -> dict[str, str]:
    """The hash of each part of the last checkpoint, and of the rows that can be sampled."""
    saved = checkpoint.load(run_folder / "checkpoint.pt")
    content = forked.must(partial(open_for_training, run_folder), run_folder.with_suffix(".log"))
    return {
        **{name: digest(value) for name, value in saved.items()},
        "rows": digest(content.rows),
    }
