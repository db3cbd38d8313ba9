"""Damaged files of a run: refused, repaired with a warning, or without effect, and never silent."""

from __future__ import annotations

import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from latentplan.config import loading
from latentplan.runs import metrics_file, session_record
from latentplan.types import UserError
from trials import forked
from trials.report import Result
from trials.small_run import (
    EPISODE,
    WRAPPED,
    Content,
    Warnings,
    digest,
    open_agent,
    open_for_training,
    train_until,
)

# Bytes that a disk writes at once. Small files are damaged by sector, so that parts of them stay.
PAGE, SECTOR = 4096, 512
PORTION = 25  # cases of one child
CASE_SECONDS = 30.0
CHECKPOINTS = ("checkpoint.pt", "checkpoint.1.pt")
REPLAY = ("obs.vector", "prev_action", "reward", "is_first", "is_terminal", "episode", "checksums")
ROW_FILES = tuple(f"replay/{name}.bin" for name in (*REPLAY, "counters"))
TEXTS = ("replay/replay.json", "config.yaml", "run.json", "metrics.jsonl")
POWER_CUT = "replay/*.bin"  # all files of the replay at once, whose pages are mixed
FILES = (*CHECKPOINTS, *ROW_FILES, *TEXTS, POWER_CUT)
# Text files, in which a damaged digit may be another valid value. They must be read or refused, and
# must not change weights, counters or rows.
CONFIG = "config.yaml"
RECORDS = ("run.json", "metrics.jsonl")  # without checksums
SETTINGS_PARTS = {"config", "optimizer", "schedules", "ratio"}  # these follow from CONFIG


class Case(NamedTuple):
    """One damaged file."""

    file: str
    way: str  # a key of WAYS
    seed: str


def flip(data: bytearray, earlier: bytes, rng: random.Random) -> None:
    """Flip one bit."""
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, earlier: bytes, rng: random.Random) -> None:
    """Cut the file short."""
    del data[rng.randrange(len(data)) :]


def zero(data: bytearray, earlier: bytes, rng: random.Random) -> None:
    """Fill one page with zeros."""
    size = _page(data)
    begin = rng.randrange(-(-len(data) // size)) * size
    data[begin : begin + size] = bytes(len(data[begin : begin + size]))


def mix(data: bytearray, earlier: bytes, rng: random.Random) -> None:
    """Take every page from this or an earlier state of the file, as a power cut may leave it."""
    size = _page(data)
    for begin in range(0, min(len(data), len(earlier)), size):
        if rng.random() < 0.5:
            page = earlier[begin : begin + size]
            data[begin : begin + len(page)] = page


def _page(data: bytearray) -> int:
    return PAGE if len(data) > 2 * PAGE else SECTOR


WAYS: dict[str, Callable[[bytearray, bytes, random.Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "zero": zero,
    "mix": mix,
}


def run(folder: Path, count: int, seed: int) -> Result:
    """Damage each kind of file ``count`` times, and open the run each time."""
    earlier, base = folder / "earlier", folder / "run"
    forked.must(partial(train_until, earlier, WRAPPED, f"seed={seed}"), folder / "log.txt")
    shutil.copytree(earlier, base)
    forked.must(
        partial(train_until, base, WRAPPED + 2 * EPISODE, f"seed={seed}"), folder / "log.txt"
    )
    ways = list(WAYS)
    cases = [
        Case(file, "mix" if file == POWER_CUT else ways[(k + n) % len(ways)], f"{seed} {file} {k}")
        for n, file in enumerate(FILES)
        for k in range(count)
    ]
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: list[str] = []
    intact = _portion(base, [], folder)["intact"]
    for begin in range(0, len(cases), PORTION):
        portion = cases[begin : begin + PORTION]
        for case, (outcome, text) in zip(
            portion, _judged(base, portion, intact, folder), strict=True
        ):
            outcomes[case.file][outcome] += 1
            if outcome in ("foreign", "silent", "ended"):
                wrong.append(f"{case.file}, {case.way} ({case.seed}): {outcome}: {text}")
    total = sum(outcomes.values(), Counter())
    return Result(
        fault="one damaged file (bit, truncation, page of zeros, pages of two states)",
        tried=len(cases),
        outcomes={**total, "kinds of files": len(FILES)},
        wrong=wrong,
        summary=f"{len(cases)} damaged files of {len(FILES)} kinds: {dict(total)}, "
        f"{total['silent']} silent loads",
        details={"by file": {name: dict(counts) for name, counts in outcomes.items()}},
    )


def _judged(
    base: Path, cases: list[Case], intact: dict[str, Any], folder: Path
) -> list[tuple[str, str]]:
    """The outcome and a text for each case. A case that ends its process is tried alone."""
    answer = _portion(base, cases, folder)
    if "ended" not in answer:
        return [
            _judge(case, found, intact) for case, found in zip(cases, answer["found"], strict=True)
        ]
    if len(cases) == 1:
        return [("ended", answer["ended"])]
    half = len(cases) // 2
    return [x for part in (cases[:half], cases[half:]) for x in _judged(base, part, intact, folder)]


def _portion(base: Path, cases: list[Case], folder: Path) -> dict[str, Any]:
    """What a child finds in damaged copies of ``base``, or without cases in intact ones."""

    def find() -> dict[str, Any]:
        if not cases:
            return {"intact": _intact(base, folder / "work")}
        return {"found": [_found(base, folder / "work", case) for case in cases]}

    answer = forked.call(find, folder / "log.txt", CASE_SECONDS * max(1, len(cases)))
    return {"ended": f"{answer.trouble}; {answer.log[-300:]}"} if answer.trouble else answer.value


def _intact(base: Path, work: Path) -> dict[str, Any]:
    """What the readers get from a run that is not damaged, and from its former checkpoint."""
    result: dict[str, Any] = {}
    for name, missing in (("newest", ""), ("former", "checkpoint.pt")):
        for reader in (open_for_training, open_agent, _records):
            _copy(base, work)
            if missing:
                (work / missing).unlink()
            result[f"{reader.__name__} {name}"] = reader(work)
    return result


def _found(base: Path, work: Path, case: Case) -> tuple[str, str, Any, list[str]]:
    """Damage a copy, open it, and return the reader, the error, the content and the warnings."""
    rng = random.Random(case.seed)
    _copy(base, work)
    for name in ROW_FILES if case.file == POWER_CUT else (case.file,):
        data = bytearray((work / name).read_bytes())
        WAYS[case.way](data, (base.with_name("earlier") / name).read_bytes(), rng)
        (work / name).write_bytes(data)
    if case.file == "checkpoint.1.pt":  # it is read only where the newest one is missing
        (work / "checkpoint.pt").unlink()
    readers = {
        "checkpoint.pt": (open_for_training, open_agent),
        "checkpoint.1.pt": (open_for_training, open_agent),
        "config.yaml": (open_for_training, open_agent),
        "run.json": (open_for_training, _records),
        "metrics.jsonl": (open_for_training, _records),
    }.get(case.file, (open_for_training,))
    reader = rng.choice(readers)
    metrics_file._warn.cache_clear()  # each path is warned about once in a process
    loading._warn_about_change.cache_clear()
    with Warnings() as warnings:
        try:
            return reader.__name__, "", reader(work), warnings.texts
        except UserError as error:
            return reader.__name__, f"UserError: {error}", None, warnings.texts
        except Exception as error:
            return reader.__name__, f"{type(error).__name__}: {error}", None, warnings.texts


def _copy(base: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)


def _records(folder: Path) -> Content:
    """The text files beside the configuration, as the reports of a run read them."""
    record = session_record.read(folder)
    rows = metrics_file.read(folder / "metrics.jsonl").rows
    return Content({"record": digest(record)}, tuple(digest(row) for row in rows))


def _judge(
    case: Case, found: tuple[str, str, Any, list[str]], intact: dict[str, Any]
) -> tuple[str, str]:
    """The outcome of a case: refused, repaired, harmless, another value, silent or foreign."""
    reader, error, content, warnings = found
    if error:
        return ("refused" if error.startswith("UserError") else "foreign"), error
    expected = intact[f"{reader} newest"]
    if case.file == "checkpoint.1.pt":
        expected = intact[f"{reader} former"]
        warnings = [text for text in warnings if "is missing" not in text]
    if content == expected:
        return ("repaired" if warnings else "harmless"), ""
    differing = [k for k in expected.parts if content.parts[k] != expected.parts[k]]
    differing += ["rows"] if content.rows != expected.rows else []
    text = f"{reader} reads other {', '.join(differing)}; warnings: {warnings}"
    if warnings and _is_repair(content, expected, intact[f"{reader} former"]):
        return "repaired", ""
    if case.file in RECORDS and reader == "_records":
        return "other value", text
    if case.file == CONFIG and set(differing) <= SETTINGS_PARTS:
        if warnings:
            return "other value, with a warning", text
        # An earlier state of the whole file is intact, so that its checksum cannot tell.
        if case.way == "mix":
            return "other value", text
    return "silent", text


def _is_repair(content: Content, expected: Content, former: Content) -> bool:
    """Whether a content is that of the former checkpoint, or lacks only damaged rows."""
    if content.parts not in (expected.parts, former.parts):
        return False
    rows = iter(expected.rows if content.parts == expected.parts else former.rows)
    return all(row in rows for row in content.rows)  # in the same order
