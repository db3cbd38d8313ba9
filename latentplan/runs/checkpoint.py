"""Checkpoints: plain values and tensors in one file, which is replaced completely or not at all.

The file is a zip file of :func:`torch.save`, followed by a mark and the CRC32 of all bytes before
the mark. The former checkpoint is kept beside the newest one, for the case that the newest one is
damaged.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from latentplan.runs import archive
from latentplan.runtime import disk
from latentplan.types import UserError

log = logging.getLogger("latentplan")
FORMAT = "latentplan-checkpoint-1"
_PLAIN = (int, float, bool, str, type(None))
_MARK = b"latentplan-crc32"
# The last record of a zip file without a comment: how it begins, and its size.
_DIRECTORY_END, _DIRECTORY_END_BYTES = b"PK\x05\x06", 22
_CHUNK = 2**20  # bytes
# A damaged file makes zipfile and torch raise many types of errors, depending on where they fail.
_DAMAGE = (
    *(OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
    *(LookupError, ValueError, TypeError, AttributeError, AssertionError, OverflowError),
    *(MemoryError, struct.error),
)


class DamagedCheckpointError(UserError):
    """A checkpoint does not hold the bytes that were saved, or is not a checkpoint."""


def former_path(path: Path) -> Path:
    """Where :func:`save` keeps the former checkpoint: ``checkpoint.1.pt`` for ``checkpoint.pt``."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def exists(path: Path) -> bool:
    """Whether there is a checkpoint ``path``, or its former one."""
    return path.exists() or former_path(path).exists()


def save(path: Path, payload: dict[str, Any], *, keep_former: bool = True) -> None:
    """Write ``payload`` to ``path``, and keep the checkpoint that was there as the former one.

    At every moment there is a complete checkpoint, at ``path`` or at :func:`former_path`. A damaged
    checkpoint is not kept, since it would replace a former one that is intact.

    The payload may contain dicts, lists, tuples, numbers, strings, None and tensors. These can be
    read back without running code.

    Raises:
        TypeError: the payload contains another type, which :func:`load` could not read.
        UserError: the disk is full or the folder cannot be written. Older checkpoints stay.
    """
    _check_types(payload, "payload")
    path = Path(path)
    former = former_path(path) if keep_former and _is_intact(path) else None
    try:
        with disk.replacing(path, former=former) as file:
            summed = _SummedFile(file)
            torch.save({"format": FORMAT, "payload": payload}, cast(IO[bytes], summed))
            file.write(_MARK + summed.sum.to_bytes(4, "big"))
    except (OSError, RuntimeError) as error:
        # The zip writer of torch wraps the error of a failed write in a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"The checkpoint {path} could not be written ({cause.strerror}); "
            + ("the previous one is intact." if exists(path) else "there is none yet.")
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a payload that :func:`save` wrote. Its tensors are on the CPU.

    All bytes of the file are checked first.
    No arbitrary objects are unpickled, so a foreign file cannot run code, and it cannot take much
    more memory than it has bytes.

    Raises:
        DamagedCheckpointError: the file does not hold the bytes that were saved, or is of another
            kind.
        UserError: there is no such file, or it is not a checkpoint of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        with path.open("rb") as file:
            _check_bytes(file)
            archive.check(file)
            content = torch.load(file, weights_only=True, map_location="cpu")
    except PermissionError as error:
        raise UserError(f"There is no permission to read the checkpoint {path}.") from error
    except _DAMAGE as error:
        raise DamagedCheckpointError(
            f"The file {path} is damaged or is not a checkpoint."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of latentplan.")
    return cast(dict[str, Any], content.get("payload"))


def load_newest(path: Path) -> dict[str, Any]:
    """Read the checkpoint ``path``, or the former one if ``path`` is damaged or missing.

    A warning says when the former one is used.

    Raises:
        DamagedCheckpointError: the newest checkpoint is damaged, and so is the former one, if there
            is one.
        UserError: as :func:`load`.
    """
    former = former_path(path)
    # A process that is killed between the two renames of `save` leaves only the former file.
    if path.exists() or not former.exists():
        try:
            return load(path)
        except DamagedCheckpointError:
            if not former.exists():
                raise
    state = "damaged" if path.exists() else "missing"
    try:
        payload = load(former)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(
            f"The checkpoint {path} is {state} and the former one, {former}, is damaged: bring one "
            "of them back, or choose another run_dir."
        ) from error
    log.warning("The checkpoint %s is %s, so the former one, %s, is used.", path, state, former)
    return payload


class _SummedFile:
    """The methods of a file that :func:`torch.save` uses. Computes the CRC32 of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sum = file, 0

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _is_intact(path: Path) -> bool:
    """Whether ``path`` is a file with the bytes that were saved."""
    try:
        with path.open("rb") as file:
            _check_bytes(file)
    except _DAMAGE:
        return False
    return True


def _check_bytes(file: IO[bytes]) -> None:
    """Raise an error of ``_DAMAGE`` if a file is not as it was saved. Returns to the file's start.

    A checkpoint of an earlier version has no CRC32 of the whole file. The zip file in it must end
    with its directory, and the CRC32 of each of its members must be right.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _DIRECTORY_END_BYTES))
    tail = file.read()
    file.seek(0)
    if tail[-len(_MARK) - 4 : -4] == _MARK:
        if _crc32(file, size - len(_MARK) - 4) != int.from_bytes(tail[-4:], "big"):
            raise ValueError("the CRC32 is not that of the content")
    elif tail[:4] != _DIRECTORY_END or zipfile.ZipFile(file).testzip() is not None:
        raise ValueError("the zip file is damaged")
    file.seek(0)


def _crc32(file: IO[bytes], size: int) -> int:
    """The CRC32 of the next ``size`` bytes of a file."""
    result = 0
    for begin in range(0, size, _CHUNK):
        result = zlib.crc32(file.read(min(_CHUNK, size - begin)), result)
    return result


def random_state() -> dict[str, Any]:
    """The states of all global random generators: torch (CPU and CUDA), NumPy, Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the states that :func:`random_state` returned, for CUDA devices that still exist."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])


def generator_state(rng: np.random.Generator) -> dict[str, Any]:
    """The state of a NumPy generator with the default bit generator, as plain integers."""
    return dict(rng.bit_generator.state)


def set_generator_state(rng: np.random.Generator, state: dict[str, Any]) -> None:
    """Set a state that :func:`generator_state` returned."""
    rng.bit_generator.state = state


def _check_types(value: Any, where: str) -> None:
    """Raise a TypeError that says where ``value`` contains a type that cannot be loaded."""
    # Exact types are compared: a NumPy scalar is a subclass of float but is refused on loading.
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in _PLAIN:
                raise TypeError(f"{where} has a key of {type(key)}, which a checkpoint cannot hold")
            _check_types(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_types(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value)}, which a checkpoint cannot hold")
