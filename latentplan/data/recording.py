"""Recorded rows: the replay of another run, or imported episodes. The folder is only read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentplan.data.checksums import row_checksums
from latentplan.data.files import (
    CURSOR,
    EARLIER_FORMAT,
    FORMAT,
    OBSERVATION_NAME,
    SEALED,
    TOUCHED,
    WITHOUT_SPARE,
    Counters,
    Fields,
    row_bytes,
    row_fields,
)
from latentplan.data.replay import Replay
from latentplan.types import EnvSpec, Timestep, UserError

log = logging.getLogger("latentplan")
MOST = 2**40  # environments, and rows of each
MOST_NUMBERS = 10**6  # along an axis of an observation or action
MOST_BYTES = 2**20  # of the description
_CHUNK_ROWS = 256


class Copied(NamedTuple):
    """What :meth:`Recording.copy_to` has copied."""

    rows: int
    episodes: int


class Recording:
    """The rows of a folder in the format of a replay.

    The folder may come from a stranger, and its run may still be training. Nothing in it is
    changed, and no file is created in it. Rows that have no checksum yet are not read.

    Args:
        folder: a run's folder ``replay``, or a folder that ``latentplan import`` wrote.

    Attributes:
        spec: the observations and actions of the rows. The action repeat is not recorded, so it is
            1 here.

    Raises:
        UserError: the folder holds no recording, or its files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._fields, self._envs, rows, spare, groups = self._describe()
        except (
            *(ValueError, KeyError, TypeError, AttributeError),
            *(OverflowError, RecursionError),
        ) as error:
            raise UserError(
                f"{folder / 'replay.json'} is damaged, so the recording cannot be read."
            ) from error
        self.spec = _spec(self._fields)._replace(action_groups=groups)
        self._slots = rows + spare
        for name, size in row_bytes(self._fields).items():
            self._require(name, self._envs * self._slots * size)
        self._require("counters", 6 * np.dtype(np.int64).itemsize)
        counters = Counters(np.fromfile(self._path("counters"), np.int64))
        cursor, touched = counters[CURSOR], counters[TOUCHED]
        self._end = counters[SEALED]
        if not counters.intact() or not 0 <= self._end <= cursor <= touched:
            raise UserError(f"The counters of the recording in {folder} are damaged.")
        self._first = max(cursor - rows, touched - self._slots, 0)

    def __len__(self) -> int:
        """Rows in the folder, over all environments."""
        return self._envs * max(0, self._end - self._first)

    def check(self, spec: EnvSpec) -> None:
        """Check that the rows have the observations and the actions of a task.

        The rows may have more observations than the task.

        Raises:
            UserError: they differ. The message gives both shapes.
        """
        for name, (shape, dtype) in spec.obs.items():
            there = self.spec.obs.get(name)
            if there != (shape, dtype):
                recorded = f"{there[1]}{there[0]}" if there else f"no {name}"
                raise UserError(
                    f"The recording in {self._folder} has {recorded}, but the task needs {name} "
                    f"{dtype}{shape}: choose the task, obs and env.image_size of the recording."
                )
        if self.spec.action_dim != spec.action_dim:
            raise UserError(
                f"The recording in {self._folder} has actions of shape ({self.spec.action_dim},), "
                f"but the task needs ({spec.action_dim},): choose the task of the recording."
            )
        if self.spec.action_groups != spec.action_groups:
            raise UserError(
                f"The recording in {self._folder} has {_kind(self.spec)}, but the task needs "
                f"{_kind(spec)}: choose the task of the recording."
            )

    def copy_to(self, replay: Replay) -> Copied:
        """Add the rows to a replay of one environment, one environment after the other.

        Damaged rows are left out, and so is the rest of their episode, since a window of rows must
        not skip any. So are the rows of an episode whose beginning was overwritten. Episodes get
        new numbers.

        Args:
            replay: has room for ``len(self)`` rows, and takes the observations that it stores.
        """
        count, episode = 0, -1
        for env in range(self._envs):
            complete = False  # whether all rows of this episode so far were intact
            for fields, intact in self._chunks(env):
                for i, (is_intact, first) in enumerate(
                    zip(intact, fields["is_first"], strict=True)
                ):
                    complete = bool(is_intact and (complete or first))
                    if complete:
                        episode += int(first)
                        replay.add(_row(fields, i), np.array([episode]))
                        count += 1
        if count < len(self):
            log.warning(
                "%d of %d rows of %s are left out, because they are damaged or the beginning of "
                "their episode is missing.",
                *(len(self) - count, len(self), self._folder),
            )
        return Copied(count, episode + 1)

    def _chunks(self, env: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Fields (K, ...) of the rows of an environment, and whether each row is intact (K,)."""
        maps = {name: self._map(name, *field) for name, field in self._fields.items()}
        checksums = self._map("checksums", (), "uint32")
        for start in range(self._first, self._end, _CHUNK_ROWS):
            rows = np.arange(start, min(start + _CHUNK_ROWS, self._end))
            slots = env * self._slots + rows % self._slots
            fields = {name: data[slots] for name, data in maps.items()}
            intact = row_checksums(list(fields.values()), rows) == checksums[slots]
            for x in fields.values():
                if x.dtype == np.float32:
                    intact &= np.isfinite(x).reshape(len(rows), -1).all(1)
            yield fields, intact

    def _describe(self) -> tuple[Fields, int, int, int, tuple[int, ...]]:
        """Read the description: the fields, the environments, rows and spare rows of each, and the
        groups of discrete actions."""
        path = self._folder / "replay.json"
        if not path.is_file():
            inner = self._folder / "replay"
            hint = f": name its folder {inner}" if (inner / "replay.json").is_file() else ""
            raise UserError(f"{self._folder} is not a recording, it has no replay.json{hint}.")
        with path.open("rb") as file:
            meta = json.loads(file.read(MOST_BYTES))
        if meta["format"] == EARLIER_FORMAT:
            raise UserError(
                f"The recording in {self._folder} is of an earlier version and has no checksums: "
                "go on with its run once, which adds them."
            )
        if meta["format"] not in (FORMAT, *WITHOUT_SPARE):
            raise ValueError("format")
        fields = {
            str(name): (tuple(_size(x, MOST_NUMBERS) for x in shape), str(dtype))
            for name, (shape, dtype) in meta["fields"].items()
        }
        if row_fields(_spec(fields), plans="prev_plan.gain" in fields) != fields:
            raise ValueError("fields")
        spare = _size(meta.get("spare", 0), least=0)
        groups = tuple(_size(x, MOST_NUMBERS) for x in meta.get("action_groups", ()))
        if groups and (sum(groups),) != fields["prev_action"][0]:
            raise ValueError("action_groups")
        return fields, _size(meta["envs"]), _size(meta["rows"]), spare, groups

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.bin"

    def _require(self, name: str, size: int) -> None:
        path = self._path(name)
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path} is missing or cut short, so the recording cannot be read.")

    def _map(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        rows = self._envs * self._slots
        return np.memmap(self._path(name), dtype, "r", shape=(rows, *shape))


def _kind(spec: EnvSpec) -> str:
    groups = spec.action_groups
    return f"discrete actions {groups}" if groups else f"continuous actions ({spec.action_dim},)"


def _size(value: object, most: int = MOST, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError("size")
    return value


def _spec(fields: Fields) -> EnvSpec:
    """The observations and actions of rows with these fields.

    Raises:
        ValueError: an observation is neither an image nor a vector, or has a wrong name.
    """
    obs = {k.removeprefix("obs."): x for k, x in fields.items() if k.startswith("obs.")}
    for name, (shape, dtype) in obs.items():
        is_image = dtype == "uint8" and len(shape) == 3 and shape[2] == 3
        is_vector = dtype == "float32" and len(shape) == 1
        if not (is_image or is_vector) or not OBSERVATION_NAME.fullmatch(name):
            raise ValueError("observation")
    (actions,) = fields["prev_action"][0]
    return EnvSpec(obs, actions, 1)


def _row(fields: dict[str, np.ndarray], i: int) -> Timestep:
    """Row ``i`` of ``fields`` (K, ...), as a row (1, ...) of one environment."""
    return Timestep.from_parts({name: x[i : i + 1] for name, x in fields.items()})
