"""What the disk has to give: space, files that are really there, and one owner of a folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from latentplan.types import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs in one folder go unnoticed there
    fcntl = None

HEADROOM = 2**28  # bytes left free on the disk, for checkpoints and logs


def gigabytes(size: int) -> str:
    """A number of bytes for people: ``6.2 GB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def require_space(folder: Path, size: int, rows: int) -> None:
    """For a replay of ``rows`` rows and ``size`` bytes.

    Raises:
        UserError: there is less; the message says how many rows would fit.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free - HEADROOM
    if size > free:
        fitting = max(0, int(rows * (free / size) * 0.9))
        raise UserError(
            f"The replay needs {gigabytes(size)} in {folder} but the disk has "
            f"{gigabytes(max(0, free))} to spare: set replay.capacity={fitting} or less, or put "
            "run_dir on another disk."
        )


def require_writable(path: Path) -> None:
    """For a file that is written after long work; its folder is made.

    Raises:
        UserError: it is a folder, or no file can be made there.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def allocate(path: Path, size: int) -> None:
    """A file of ``size`` zero bytes, its blocks reserved: a mapped file that meets a full disk on
    a later write kills the process without a word."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of ``path`` whole or not at all.

    Also after a power cut: the content is on the disk before the name is.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename itself outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path) -> IO[bytes]:
    """Held until closed, and by the system let go when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    file = (folder / "lock").open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"Another process is training with the replay in {folder}.") from error
    except OSError:  # a file system without locks: better to train unguarded than not at all
        return file
    return file
