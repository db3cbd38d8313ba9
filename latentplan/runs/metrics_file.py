"""The lines of ``metrics.jsonl``. A damaged line is left out, so that it costs only itself."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("latentplan")
LARGEST_STEP = 2**63 - 1
ROW = re.compile(rb"\{[^{}]*\}")  # a row has no objects inside
LARGEST = 1e308  # a larger number does not fit into a float


class Metrics(NamedTuple):
    """The content of a file of metrics."""

    rows: list[dict[str, Any]]  # step, and numbers or None by name
    lines: list[str]  # the text of each row, with a line break
    damaged: tuple[int, ...]  # numbers of the lines that are damaged, from 1


def read(path: Path) -> Metrics:
    """Read a ``metrics.jsonl`` file. One warning names the damaged lines.

    A last line without a line break may still be being written, so no warning names it.

    Raises:
        OSError: the file cannot be read.
    """
    rows, lines, damaged = [], [], []
    for number, line, complete in _lines(path.read_bytes()):
        parts = [line]
        if _row(line) is None:
            # A damaged line break joins two rows, each of which may still be whole.
            parts = ROW.findall(line)
            damaged += [number] if complete else []
        for part in parts:
            if (row := _row(part)) is not None:
                rows.append(row)
                lines.append(part.decode() + "\n")
    if damaged:
        _warn(path, tuple(damaged))
    return Metrics(rows, lines, tuple(damaged))


def _lines(content: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """Every line that is not blank: its number, its bytes, and whether a line break ends it."""
    parts = content.split(b"\n")
    for number, line in enumerate(parts, 1):
        if line.strip():
            yield number, line.rstrip(b"\r"), number < len(parts)


def _row(line: bytes) -> dict[str, Any] | None:
    """The values of a line; None if the line is damaged."""
    try:
        row = json.loads(line.decode(), parse_constant=lambda name: None)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deeply
        return None
    if not isinstance(row, dict) or not all(map(_is_value, row.values())):
        return None
    step = row.get("step")
    return row if isinstance(step, int) and 0 <= step <= LARGEST_STEP else None


def _is_value(value: object) -> bool:
    """Whether a line may hold a value: a finite number, or null for one that was not finite."""
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST <= value <= LARGEST


@cache  # A file is read several times, by a study even every minute.
def _warn(path: Path, damaged: tuple[int, ...]) -> None:
    first = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
    lines = f"line {first} is" if len(damaged) == 1 else f"lines {first} are"
    log.warning("%s: %s damaged and left out.", path, lines)
