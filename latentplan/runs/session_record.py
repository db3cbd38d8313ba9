"""``run.json``: the sessions of a run, and what its newest checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from latentplan.runtime import disk
from latentplan.types import UserError

MOST_BYTES = 2**24  # of run.json; a session takes about 2 KiB
# Types of the values of a session that are used. Earlier versions lack some of the keys.
TYPES: dict[str, type | tuple[type, ...]] = {
    "command": list,
    "commit": (str, type(None)),
    "precision": str,
    "render_quality": (str, type(None)),
}


class Record(TypedDict):
    """The content of ``run.json``."""

    saved: bool  # whether a checkpoint was ever saved
    frames: int | None  # environment frames of the newest checkpoint; None: not recorded
    sessions: list[dict[str, Any]]  # as `latentplan.runs.provenance.describe` gave them


def read(folder: Path) -> Record:
    """The record of a run; an empty one if there is none.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    path = folder / "run.json"
    if not path.exists():
        return {"saved": False, "frames": None, "sessions": []}
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise ValueError("not a file of the size of a record")
        content = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions did not record this. The safe answer is that a checkpoint was saved.
        saved = content.get("saved", True)
        if not isinstance(saved, bool):
            raise ValueError("saved is not true or false")
        frames = content.get("frames")
        if not isinstance(frames, int | None) or isinstance(frames, bool):
            raise ValueError("frames is not a number of frames")
        sessions = [_session(x) for x in content["sessions"]]
        return {"saved": saved, "frames": frames, "sessions": sessions}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: restore it, or remove it to continue without the record of "
            "earlier sessions."
        ) from error


def _session(value: Any) -> dict[str, Any]:
    """A session, whose values in TYPES are checked."""
    session = dict(value)
    for key, kind in TYPES.items():
        if key in session and not isinstance(session[key], kind):
            raise ValueError(f"{key} has another type")
    if not all(isinstance(word, str) for word in session.get("command", [])):
        raise ValueError("command is not a list of words")
    return session


def write(folder: Path, record: Record) -> None:
    """Replace the record of a run.

    Raises:
        UserError: it cannot be written. The former file stays.
    """
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file completely or not at all, because a run without its records is lost.

    Raises:
        UserError: it cannot be written. The former file stays.
    """
    try:
        with disk.replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
