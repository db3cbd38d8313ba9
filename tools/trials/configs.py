"""Random configurations: each becomes a `Config` or one sentence, soon and in little memory."""

from __future__ import annotations

import random
import resource
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from latentplan.config.loading import as_config, load_resolved, to_yaml
from latentplan.config.tasks import parse_task
from latentplan.types import UserError
from trials import config_texts, forked
from trials.report import Result

PORTION = 250  # cases of one child
# One case may take so long. It takes 0.01 to 0.1 s on an idle core; others may use this one.
CASE_SECONDS = 5.0
CASE_MEMORY = 2**27  # bytes by which a case may raise the peak of its process


class _TooLongError(BaseException):
    """A case took more than `CASE_SECONDS`. No ``except Exception`` of the package stops it."""


class Found(NamedTuple):
    """What became of a case."""

    outcome: str  # valid, refused, foreign, slow, memory
    text: str
    seconds: float


def run(folder: Path, count: int, seed: int) -> Result:
    """Read ``count`` random configurations as the command line does."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    for begin in range(0, count, PORTION):
        seeds = [f"{seed} {k}" for k in range(begin, min(begin + PORTION, count))]
        for case, found in zip(seeds, _tried(seeds, folder), strict=True):
            outcomes[found.outcome] += 1
            slowest = max(slowest, found.seconds)
            if found.outcome not in ("valid", "refused"):
                wrong.append(f"case {case!r}: {found.outcome}: {found.text}")
    return Result(
        fault="random configurations, as files and as key=value",
        tried=count,
        outcomes={**outcomes, "slowest, seconds": round(slowest, 2)},
        wrong=wrong,
        summary=f"{count} configurations: {dict(outcomes)}, the slowest took {slowest:.2f} s",
    )


def _tried(seeds: list[str], folder: Path) -> list[Found]:
    """The outcomes of cases, in one child. A case that ends the child is tried alone."""
    answer = forked.call(
        partial(_read_all, seeds, folder), folder / "log.txt", 60 + CASE_SECONDS * len(seeds)
    )
    if not answer.trouble:
        return answer.value
    if len(seeds) == 1:
        return [Found("foreign", f"{answer.trouble}; {answer.log[-300:]}", 0.0)]
    half = len(seeds) // 2
    return _tried(seeds[:half], folder) + _tried(seeds[half:], folder)


def _read_all(seeds: list[str], folder: Path) -> list[Found]:
    signal.signal(signal.SIGALRM, _give_up)
    as_config([])  # so that no case pays for what the package keeps
    return [_read(seed, folder) for seed in seeds]


def _give_up(number: int, frame: FrameType | None) -> None:
    raise _TooLongError


def _read(seed: str, folder: Path) -> Found:
    items = config_texts.items(random.Random(seed), folder)
    peak, begun = _peak(), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        outcome, text = _outcome(items, folder)
    except _TooLongError:
        outcome, text = "slow", ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if _peak() - peak > CASE_MEMORY and outcome in ("valid", "refused"):
        outcome, text = "memory", f"{(_peak() - peak) / 2**20:.0f} MiB"
    if outcome not in ("valid", "refused"):
        text += f" for {[item[:200] for item in items]!r}"
    return Found(outcome, text, time.monotonic() - begun)


def _outcome(items: list[str], folder: Path) -> tuple[str, str]:
    """Read a configuration, and write and read it again, as a run folder does."""
    try:
        config = as_config(items)
        parse_task(config.task)
    except UserError as error:
        text = str(error)
        return ("refused", "") if 0 < len(text) < 2000 and "\n" not in text else ("foreign", text)
    except Exception as error:
        return "foreign", f"{type(error).__name__}: {error}"[:300]
    saved = folder / "config.yaml"
    try:
        saved.write_text(to_yaml(config), encoding="utf-8")
        again: Any = load_resolved(saved)
    except Exception as error:
        return (
            "foreign",
            f"a valid configuration is not read again: {type(error).__name__}: {error}",
        )
    return ("valid", "") if again == config else ("foreign", "is read again as another one")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
