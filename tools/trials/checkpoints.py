"""Checkpoints with wrong content and right checksums: refused in one sentence, or usable.

The changes are those of ``tests/checkpoint_fuzz.py``, whose quick form is one of the tests.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from latentplan.runs import checkpoint
from latentplan.types import UserError
from trials import forked
from trials.report import Result
from trials.small_run import Warnings, open_agent, open_for_training, train_until

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from checkpoint_fuzz import mutated

PORTION = 50  # cases of one child
CASE_SECONDS = 30.0
FRAMES = 128  # of the run whose checkpoint is changed
TRAINED = 16  # frames that a run goes on from a checkpoint that is accepted


class Found(NamedTuple):
    """What became of a case."""

    outcome: str  # refused, usable, foreign or ended
    text: str


def run(folder: Path, count: int, seed: int) -> Result:
    """Change the content of a checkpoint ``count`` times, and use the run each time."""
    base = folder / "run"
    forked.must(partial(train_until, base, FRAMES), folder / "log.txt")
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for begin in range(0, count, PORTION):
        seeds = [f"{seed} {k}" for k in range(begin, min(begin + PORTION, count))]
        for case, found in zip(seeds, _tried(seeds, base, folder), strict=True):
            outcomes[found.outcome] += 1
            if found.outcome not in ("refused", "usable"):
                wrong.append(f"case {case!r}: {found.outcome}: {found.text}")
    return Result(
        fault="a checkpoint with random changes of its content and a right checksum",
        tried=count,
        outcomes=dict(outcomes),
        wrong=wrong,
        summary=f"{count} changed checkpoints: {dict(outcomes)}",
    )


def _tried(seeds: list[str], base: Path, folder: Path) -> list[Found]:
    """The outcomes of cases, in one child. A case that ends the child is tried alone."""
    answer = forked.call(
        partial(_use_all, seeds, base, folder / "work"),
        folder / "log.txt",
        CASE_SECONDS * len(seeds),
    )
    if not answer.trouble:
        return answer.value
    if len(seeds) == 1:
        return [Found("ended", f"{answer.trouble}; {answer.log[-300:]}")]
    half = len(seeds) // 2
    return _tried(seeds[:half], base, folder) + _tried(seeds[half:], base, folder)


def _use_all(seeds: list[str], base: Path, work: Path) -> list[Found]:
    good = checkpoint.load(base / "checkpoint.pt")
    return [_use(seed, good, base, work) for seed in seeds]


def _use(seed: str, good: dict[str, Any], base: Path, work: Path) -> Found:
    """Change the checkpoint, and load its agent or train on from it."""
    rng = random.Random(seed)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    bad, change = mutated(good, rng)
    checkpoint.save(work / "checkpoint.pt", bad, keep_former=False)
    reader = rng.choice((open_agent, partial(open_for_training, frames=TRAINED)))
    with Warnings():
        try:
            reader(work)
        except UserError as error:
            return Found("refused", str(error))
        except Exception as error:
            return Found("foreign", f"{change}: {type(error).__name__}: {error}"[:400])
    return Found("usable", "")
