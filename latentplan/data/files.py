"""The files of a replay: one per field of a row, their checksums, counters, and a description."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from latentplan.runtime import disk
from latentplan.types import EnvSpec, UserError

FORMAT = 3
EARLIER_FORMAT = 1  # has neither checksums nor complements of the counters
WITHOUT_SPARE = (EARLIER_FORMAT, 2)  # formats without spare rows
_EARLIER_COUNTERS_BYTES = 16
_CHUNK = 2**20  # bytes that are read at once
CURSOR, TOUCHED, SEALED = range(3)
_COUNTERS = 3
# Names of observations become names of files and modules.
OBSERVATION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")

Fields = dict[str, tuple[tuple[int, ...], str]]


class Counters:
    """The counters of a replay, mapped from a file that also holds the complement of each.

    Args:
        values: the content of the file, (6,) int64.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = values.data  # storing through a memoryview is faster than through an array

    def __getitem__(self, index: int) -> int:
        return self._values[index]

    def __setitem__(self, index: int, count: int) -> None:
        self._values[index] = count
        self._values[index + _COUNTERS] = ~count

    def intact(self) -> bool:
        """Whether each counter agrees with its complement."""
        values = self._values[:_COUNTERS].tolist()
        complemented = [~x for x in self._values[_COUNTERS:].tolist()]
        # A process that ended between the two writes of `__setitem__` left them one apart. A page
        # of zeros would also be one apart, from -1.
        return all(
            value - other in (0, 1) and other >= 0
            for value, other in zip(values, complemented, strict=True)
        )


class ReplayFiles:
    """Creates or opens the files of a replay, and locks its folder.

    Args:
        folder: the folder of the replay.
        fields: name, shape and dtype of the parts of a row.
        envs: the number of environments.
        rows: rows per environment that can be sampled.
        spare: further rows per environment, in a folder that is created. A folder that exists keeps
            the number it was created with.
        action_groups: the numbers of choices of discrete actions, for readers of the folder.

    Attributes:
        slots: rows per environment with the spare ones.
        fields: the parts of all rows, each (envs * slots, ...), mapped from their files.
        checksums: the checksums of all rows, (envs * slots,) uint32.
        counters: the counters.
        earlier: the folder was made by an earlier version, and its rows have no checksums yet.

    Raises:
        UserError: the folder holds rows of another shape or is in use by another run, or the disk
            is too small. The folder stays as it was.
    """

    def __init__(
        self,
        folder: Path,
        fields: Fields,
        envs: int,
        rows: int,
        spare: int,
        action_groups: tuple[int, ...] = (),
    ) -> None:
        self._folder, self._fields, self._envs, self._rows = folder, fields, envs, rows
        self._spare, self._groups = spare, action_groups
        self._lock: FileLock | None = None
        self._description = folder / "replay.json"
        self.earlier = False
        if self._description.exists():
            self.earlier = self._check()
            self._lock = disk.lock(folder)
            if self.earlier:
                self._extend()
        else:
            self._create()
        maps = {
            name: np.memmap(self._path(name), dtype, "r+", shape=(envs * self.slots, *shape))
            for name, (shape, dtype) in {**fields, "checksums": ((), "uint32")}.items()
        }
        maps["counters"] = np.memmap(self._path("counters"), np.int64, "r+", shape=(2 * _COUNTERS,))
        self._maps = maps
        # Plain views: indexing a memmap costs several times more than indexing an array.
        self.fields = {name: np.asarray(maps[name]) for name in fields}
        self.checksums = np.asarray(maps["checksums"])
        self.counters = Counters(np.asarray(maps["counters"]))

    @property
    def slots(self) -> int:
        return self._rows + self._spare

    def flush(self) -> None:
        """Write everything to the disk, so that it survives a power cut."""
        for data in self._maps.values():
            data.flush()

    def not_empty(self, begin: int) -> list[str]:
        """The files that hold bytes where no row was ever written.

        Args:
            begin: the first slot of each environment that was never written.
        """
        return [
            name
            for name, size in row_bytes(self._fields).items()
            if any(
                _has_bytes(self._path(name), (end - self.slots + begin) * size, end * size)
                for end in range(self.slots, (self._envs + 1) * self.slots, self.slots)
            )
        ]

    def close(self) -> None:
        """Unlock the folder. The object cannot be used afterwards."""
        self.fields, self._maps = {}, {}
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def describe(self) -> None:
        """Write the description, which makes the folder one of the present format."""
        with disk.replacing(self._description) as file:
            file.write(json.dumps(self._meta(), indent=1).encode())
        self.earlier = False

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.bin"

    def _meta(self) -> dict[str, Any]:
        fields = {name: [list(shape), dtype] for name, (shape, dtype) in self._fields.items()}
        sizes = {"envs": self._envs, "rows": self._rows, "spare": self._spare}
        groups = {"action_groups": list(self._groups)} if self._groups else {}
        return {"format": FORMAT, **sizes, "fields": fields, **groups}

    def _sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        rows = self._envs * self.slots
        sizes = {name: rows * size for name, size in row_bytes(self._fields).items()}
        return {"counters": 2 * _COUNTERS * np.dtype(np.int64).itemsize, **sizes}

    def _check(self) -> bool:
        """Check that the folder fits this run, and read how many spare rows it has.

        Returns:
            Whether the rows have no checksums yet.
        """
        path = self._description
        try:
            meta = json.loads(path.read_text())
            earlier = meta["format"] == EARLIER_FORMAT
            if meta["format"] in WITHOUT_SPARE:
                meta |= {"format": FORMAT, "spare": 0}
            self._spare = int(meta["spare"])
            there = _described(meta)
            here = _described(self._meta())
        except (
            *(ValueError, KeyError, TypeError, AttributeError),
            *(OverflowError, RecursionError, OSError),
        ) as error:
            raise UserError(f"{path} is damaged and the replay cannot be read.") from error
        for name in [*here, *(name for name in there if name not in here)]:
            if there.get(name) != here.get(name):
                raise UserError(
                    f"The replay in {self._folder} has {name} {there.get(name, 'missing')} but "
                    f"this run needs {here.get(name, 'none')}: choose another run_dir."
                )
        sizes = self._sizes()
        least = dict(sizes)
        if earlier:
            least["counters"], least["checksums"] = _EARLIER_COUNTERS_BYTES, 0
        for name, size in sizes.items():
            data = self._path(name)
            there_bytes = data.stat().st_size if data.exists() else 0
            if not least[name] <= there_bytes <= size:
                raise UserError(f"{data} is missing or cut short and the replay cannot be read.")
        return earlier

    def _create(self) -> None:
        """Create the files, then their description: a folder without one is incomplete."""
        sizes = self._sizes()
        disk.require_space(self._folder, sum(sizes.values()), self._envs * self._rows)
        created: list[Path] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = disk.lock(self._folder)
            for name, size in sizes.items():
                created.append(self._path(name))
                disk.allocate(self._path(name), size)
            np.repeat(np.array([0, ~0], np.int64), _COUNTERS).tofile(self._path("counters"))
            self.describe()
        except OSError as error:
            for path in created:
                path.unlink(missing_ok=True)
            raise UserError(
                f"The replay of {disk.gigabytes(sum(sizes.values()))} cannot be created in "
                f"{self._folder}: {error.strerror}."
            ) from error

    def _extend(self) -> None:
        """Give a folder of an earlier version the files of the present format.

        Its description stays that of the earlier version until the rows have checksums.
        """
        sizes = self._sizes()
        try:
            os.truncate(self._path("counters"), sizes["counters"])
            disk.allocate(self._path("checksums"), sizes["checksums"])
        except OSError as error:
            raise UserError(
                f"The checksums of the replay in {self._folder} cannot be written: "
                f"{error.strerror}."
            ) from error


def _has_bytes(path: Path, position: int, end: int) -> bool:
    """Whether a part of a file has a byte that is not zero. Parts without data are not read."""
    with path.open("rb") as file:
        while position < end:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                return False  # there is no data behind the position
            block = os.pread(file.fileno(), max(0, min(_CHUNK, end - position)), position)
            if block.strip(b"\0"):
                return True
            position += _CHUNK
    return False


def row_fields(spec: EnvSpec, plans: bool) -> Fields:
    """Name, shape and dtype of the parts of a row, with those of a plan where ``plans`` is set."""
    action: tuple[tuple[int, ...], str] = ((spec.action_dim,), "float32")
    planned: Fields = {"prev_plan.mean": action, "prev_plan.std": action}
    planned["prev_plan.gain"] = ((), "float32")
    return {
        **{f"obs.{name}": (tuple(shape), dtype) for name, (shape, dtype) in spec.obs.items()},
        "prev_action": action,
        "reward": ((), "float32"),
        "is_first": ((), "bool"),
        "is_terminal": ((), "bool"),
        **(planned if plans else {}),
        "episode": ((), "int64"),
    }


def row_bytes(fields: Fields) -> dict[str, int]:
    """Bytes that a row takes in the file of each field, and in that of the checksums."""
    sizes = {
        name: np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        for name, (shape, dtype) in fields.items()
    }
    return {**sizes, "checksums": np.dtype(np.uint32).itemsize}


def _described(meta: dict[str, Any]) -> dict[str, str]:
    """The description of a replay as texts, for comparison and for error messages."""
    fields = {
        name: f"{dtype}{tuple(int(n) for n in shape)}"
        for name, (shape, dtype) in meta["fields"].items()
    }
    rest = {"rows per environment": "rows", "environments": "envs", "format": "format"}
    return {**fields, **{label: str(meta[key]) for label, key in rest.items()}}
