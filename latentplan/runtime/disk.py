"""Disk space, files that are written whole, and the lock of a folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from latentplan.types import UserError

HEADROOM = 2**28  # bytes left free on the disk, for checkpoints and logs


def gigabytes(size: int) -> str:
    """A number of bytes as text, such as ``6.2 GB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def require_space(folder: Path, size: int, rows: int) -> None:
    """Check that the disk has room for a replay of ``rows`` rows and ``size`` bytes.

    Raises:
        UserError: there is too little space. The message says how many rows would fit.
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
    """Check, before long work, that a file can be written at ``path``; create its folder.

    Raises:
        UserError: ``path`` is a folder, or no file can be created there.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def allocate(path: Path, size: int) -> None:
    """Create a file of ``size`` zero bytes and reserve its blocks.

    If the disk were full at a later write into the mapped file, the system would end the process
    without a message.
    """
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


@contextmanager
def replacing(path: Path, former: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that replaces ``path`` when it is complete, and only then.

    This also holds after a power cut, because the content is on the disk before the name is.

    Args:
        path: the file to replace.
        former: the file that is at ``path`` is renamed to this name, in the same folder. If the
            process ends between the two renames, there is no file at ``path``.

    Raises:
        OSError: the file cannot be written. The former file stays.
    """
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a link of this name, in a stranger's folder, is gone
            yield file
            file.flush()
            os.fsync(file.fileno())
        if former is not None:
            os.replace(path, former)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Write a rename to the disk, so that it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path) -> FileLock:
    """Lock a folder for this process; release the result to unlock it.

    The system releases the lock when the process ends in any way.

    Raises:
        UserError: another process, or another lock of this one, holds the lock.
        OSError: the lock's file cannot be written.
    """
    path = folder / "lock"
    path.open("ab").close()  # an error here is not caused by missing locks, so it is not ignored
    # filelock's fallback would take the file itself for a lock, which outlives a killed process.
    # The lock belongs to the process, so any thread may release it.
    file = FileLock(path, fallback_to_soft=False, thread_local=False)
    try:
        file.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"Another process is training in {folder}: wait until it has ended, or choose another "
            "run_dir."
        ) from error
    except OSError:
        pass  # on a file system without locks, training goes on without protection
    return file


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder during a block. The folder is created if it does not exist.

    A folder that was created and holds nothing else at the end of the block is removed.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        if created and [path.name for path in folder.iterdir()] == ["lock"]:
            shutil.rmtree(folder)
        held.release()
