"""Environments that fail once, in many ways: the run goes on, and counts the fault."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from latentplan.cli.main import main
from latentplan.runs import checkpoint
from trials import failing_env, forked
from trials.report import Result
from trials.small_run import EPISODE, SETTINGS

FRAMES = 5 * EPISODE
TIMEOUT = 20.0  # env.timeout, after which an environment that hangs is ended
SECONDS = 240.0  # for a whole run
ITEMS = (
    *("task=gym:Failing-v0", "env.workers=true", f"env.episode_frames={EPISODE}"),
    *(f"steps={FRAMES}", f"env.timeout={TIMEOUT}", "log.every=64"),
)


def run(folder: Path, count: int, seed: int, kinds: Sequence[str] = failing_env.FAULTS) -> Result:
    """Train ``count`` runs for each kind of fault."""
    survived: Counter[str] = Counter()
    wrong: list[str] = []
    for kind in kinds:
        for repeat in range(count):
            found = _tried(folder / f"{kind} {repeat}".replace(" ", "-"), kind, seed + repeat)
            survived[kind] += not found
            wrong += [f"{kind}: {text}" for text in found]
    whole = sum(survived[kind] == count for kind in kinds)
    return Result(
        fault="an environment in a worker fails once",
        tried=count * len(kinds),
        outcomes={"kinds of faults": len(kinds), "kinds survived": whole},
        wrong=wrong,
        summary=f"{whole} of {len(kinds)} kinds of environment faults survived, each tried {count} "
        "times",
        details={"survived": {kind: survived[kind] for kind in kinds}},
    )


def _tried(folder: Path, kind: str, seed: int) -> list[str]:
    """Train a run whose environment fails. Returns what is wrong with it."""
    folder.mkdir()
    marker = folder / "happened"
    answer = forked.call(
        partial(_train, folder / "run", kind, marker, seed), folder / "log.txt", SECONDS
    )
    _end_orphan(Path(f"{marker}.pid"))
    if answer.trouble:
        return [f"{answer.trouble}; {answer.log[-300:]}"]
    wrong = [f"exit code {answer.value}: {answer.log[-300:]}"] if answer.value else []
    if not marker.exists():
        wrong.append("the fault did not happen")
    saved = folder / "run" / "checkpoint.pt"
    frames = checkpoint.load(saved)["frames"] if saved.exists() else 0
    if frames < FRAMES:
        wrong.append(f"{frames} of {FRAMES} frames")
    if not _rewards_are_finite(folder / "run" / "replay"):
        wrong.append("the replay holds a reward that is not finite")
    if not _counted(folder / "run" / "metrics.jsonl") and kind not in failing_env.HARMLESS:
        wrong.append("metrics.jsonl counts no env/faults")
    return wrong


def _train(folder: Path, kind: str, marker: Path, seed: int) -> int:
    """Train with the command line, in this process. Workers inherit its environment variables."""
    os.environ |= {"FAULT": kind, "FAULT_FILE": str(marker)}
    module = f"env.module={failing_env.__file__}"
    return main(["train", *SETTINGS, *ITEMS, module, f"seed={seed}", f"run_dir={folder}"])


def _counted(metrics: Path) -> bool:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return any((json.loads(line).get("env/faults") or 0) >= 1 for line in lines)


def _rewards_are_finite(replay: Path) -> bool:
    path = replay / "reward.bin"
    return not path.exists() or math.isfinite(float(np.abs(np.fromfile(path, np.float32)).max()))


def _end_orphan(path: Path) -> None:
    """End the child that an environment has left."""
    if path.exists():
        with suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)
