"""The result of a trial as a JSON file and as a row of the table in docs/reliability.md."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentplan import __version__
from latentplan.runs.provenance import PACKAGES, commit, processor, version

SHOWN = 20  # wrong outcomes that a file describes


class TrialError(Exception):
    """A trial cannot begin, because the run that it would disturb does not work."""


@dataclass
class Result:
    """What a trial found."""

    fault: str  # in words
    tried: int
    outcomes: dict[str, Any]
    wrong: list[str]  # a description of each wrong outcome
    summary: str  # one line
    details: dict[str, Any] = field(default_factory=dict)


def write(result: Result, path: Path, seed: int, started: float) -> None:
    """Write a result with its origin: command, commit, seed and machine."""
    content = {
        "fault": result.fault,
        "tried": result.tried,
        "outcomes": result.outcomes,
        "wrong": len(result.wrong),
        "wrong_outcomes": result.wrong[:SHOWN],
        "summary": result.summary,
        "command": shlex.join(["tools/reliability", *sys.argv[1:]]),
        "seed": seed,
        "seconds": round(time.time() - started, 1),
        "latentplan": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": {"cores": os.cpu_count(), "processor": processor()},
        **result.details,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(paths: list[Path]) -> str:
    """The rows of results for docs/reliability.md."""
    lines = ["| fault | tried | outcome | command |", "|---|---|---|---|"]
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        outcomes = ", ".join(f"{name}: {value}" for name, value in content["outcomes"].items())
        lines.append(
            f"| {content['fault']} | {content['tried']:,} | {outcomes}; wrong: "
            f"{content['wrong']} | `{content['command']}` |"
        )
    return "\n".join(lines)
