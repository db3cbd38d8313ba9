"""Replay on disk: one memory-mapped ring of rows per environment.

Rows are numbered per environment from 0; row ``i`` lives in slot ``i % rows``. Two
counters, which are mapped from a file in the folder, say which rows are valid::

    row       0 ........ touched - rows ........ cursor ........ touched
              overwritten           | can be sampled | dropped on resume |

``cursor`` is the next row to write. ``touched`` is the end of the slots that were ever written. It
is larger than ``cursor`` while a row is being written. It is also larger after a resume from a
checkpoint that is older than the folder: the rows after the checkpoint are dropped, and the rows
that they overwrote stay lost.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from latentplan.runtime import disk
from latentplan.types import EnvSpec, Timestep, UserError

FORMAT = 1


class Replay:
    """The last ``capacity // envs`` rows of each environment, for one thread of one process.

    Creates ``folder`` with files of their final size, or reopens it with its rows.

    Raises:
        UserError: the folder holds rows of another shape or is in use by another run, or the disk
            is too small. The folder stays as it was.
    """

    def __init__(self, folder: Path, spec: EnvSpec, *, capacity: int, envs: int) -> None:
        if capacity < envs:
            raise UserError(f"replay.capacity={capacity} has no row for each of {envs} envs.")
        self._folder = Path(folder)
        self._envs, self._rows = envs, capacity // envs
        self._fields = _fields(spec)
        self._lock: FileLock | None = None
        meta = self._folder / "replay.json"
        if meta.exists():
            self._check_meta(meta)
            self._lock = disk.lock(self._folder)
        else:
            self._create(meta)
        self._maps = {
            name: np.memmap(self._path(name), dtype, "r+", shape=(envs * self._rows, *shape))
            for name, (shape, dtype) in self._fields.items()
        }
        self._maps["counters"] = np.memmap(self._path("counters"), np.int64, "r+", shape=(2,))
        # Plain views: indexing a memmap costs several times more than indexing an array.
        self._flat = {name: np.asarray(self._maps[name]) for name in self._fields}
        self._rings = {
            name: flat.reshape(envs, self._rows, *flat.shape[1:])
            for name, flat in self._flat.items()
        }
        self._counters = np.asarray(self._maps["counters"])
        self._cursor, self._touched = (int(count) for count in self._counters)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether ``folder`` holds a replay, which would be reopened."""
        return (folder / "replay.json").exists()

    @staticmethod
    def size_bytes(spec: EnvSpec, capacity: int) -> int:
        """Bytes on disk of ``capacity`` rows."""
        return capacity * sum(
            np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
            for shape, dtype in _fields(spec).values()
        )

    def __len__(self) -> int:
        """Rows that can be sampled, over all environments."""
        return self._envs * (self._cursor - self._first)

    @property
    def _first(self) -> int:
        """The oldest complete row."""
        return max(self._touched, self._cursor, self._rows) - self._rows

    def add(self, row: Timestep, episode: np.ndarray) -> None:
        """Append one row ``(N, ...)`` per environment, and the numbers of their episodes (N,).

        Raises:
            ValueError: a field has another shape than the replay's.
        """
        slot = self._cursor % self._rows
        values = _flatten(row, episode)
        for name, ring in self._rings.items():
            if np.shape(values[name]) != (self._envs, *ring.shape[2:]):
                raise ValueError(
                    f"{name}: got {np.shape(values[name])} for {self._envs} x {ring.shape[2:]}"
                )
        # In this order an incomplete row is in neither counter if the process ends in between.
        self._touched = self._counters[1] = max(self._touched, self._cursor + 1)
        for name, ring in self._rings.items():
            ring[:, slot] = values[name]
        self._cursor = self._counters[0] = self._cursor + 1

    def ready(self, length: int) -> bool:
        """Whether a window of ``length`` rows can be sampled."""
        return self._cursor - self._first >= length

    def sample(
        self, batch: int, length: int, rng: np.random.Generator
    ) -> tuple[Timestep, np.ndarray]:
        """Draw ``batch`` windows of ``length`` rows, uniformly over environments and starts.

        A window is ``length`` consecutive rows of one environment. It may contain the end of an
        episode (``is_first`` marks the next one), but never the write head.

        Returns:
            Copies of the rows ``(B, T, ...)``, and the number of each row's episode ``(B, T)``
            int64.

        Raises:
            ValueError: there is no such window yet (:meth:`ready`).
        """
        if not self.ready(length):
            raise ValueError(f"no window of {length} rows among {len(self)}")
        env = rng.integers(self._envs, size=(batch, 1))
        start = rng.integers(self._first, self._cursor - length + 1, size=(batch, 1))
        index = env * self._rows + (start + np.arange(length)) % self._rows
        values = {name: flat.take(index, axis=0) for name, flat in self._flat.items()}
        episode = values.pop("episode")
        return _gather(values), episode

    def sample_within_episodes(self, count: int, length: int, rng: np.random.Generator) -> Timestep:
        """Draw up to ``count`` windows (B, T, ...), each within one episode, for inspection."""
        rows, episode = self.sample(4 * count, length, rng)
        keep = np.flatnonzero((episode == episode[:, :1]).all(1))[:count]
        return rows.map(lambda x: x[keep])

    def history(self) -> Timestep:
        """Copies of all rows ``(N, T, ...)``, oldest first.

        Raises:
            UserError: the first rows were overwritten.
        """
        if self._first:
            raise UserError(
                f"The replay in {self._folder} no longer has the run's first {self._first} rows: "
                "a larger replay.capacity would keep them."
            )
        rows = {name: ring[:, : self._cursor].copy() for name, ring in self._rings.items()}
        del rows["episode"]
        return _gather(rows)

    def clear(self) -> None:
        """Remove all rows; for a run that starts again in a folder without a checkpoint."""
        self._set_counters(0, 0)

    def state_dict(self) -> dict[str, int]:
        return {"cursor": self._cursor, "rows": self._rows, "envs": self._envs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Return to the rows at the time of ``state``, without those that were overwritten since.

        Raises:
            UserError: the folder holds fewer rows than at the time of the checkpoint.
        """
        if (state["rows"], state["envs"]) != (self._rows, self._envs):
            raise UserError(
                f"The checkpoint belongs to a replay of {state['envs']} x {state['rows']} rows, "
                f"but {self._folder} holds {self._envs} x {self._rows}."
            )
        cursor = state["cursor"]
        if cursor > self._cursor:
            raise UserError(
                f"The replay in {self._folder} has {self._cursor} rows per environment but the "
                f"checkpoint was saved after {cursor}: bring the folder back, or choose another "
                "run_dir."
            )
        self._set_counters(cursor, min(self._touched, cursor + self._rows))

    def flush(self) -> None:
        """Write everything to the disk, so that it survives a power cut."""
        for data in self._maps.values():
            data.flush()

    def close(self) -> None:
        """Flush and unlock the folder. The object cannot be used afterwards."""
        self.flush()
        self._rings, self._flat, self._maps = {}, {}, {}
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _set_counters(self, cursor: int, touched: int) -> None:
        self._cursor = self._counters[0] = cursor
        self._touched = self._counters[1] = touched

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.bin"

    def _meta(self) -> dict[str, Any]:
        fields = {name: [list(shape), dtype] for name, (shape, dtype) in self._fields.items()}
        return {"format": FORMAT, "envs": self._envs, "rows": self._rows, "fields": fields}

    def _check_meta(self, path: Path) -> None:
        try:
            there, here = _described(json.loads(path.read_text())), _described(self._meta())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged and the replay cannot be read.") from error
        for name in [*here, *(name for name in there if name not in here)]:
            if there.get(name) != here.get(name):
                raise UserError(
                    f"The replay in {self._folder} has {name} {there.get(name, 'missing')} but "
                    f"this run needs {here.get(name, 'none')}: choose another run_dir."
                )
        for name, size in self._file_sizes().items():
            data = self._path(name)
            if not data.exists() or data.stat().st_size != size:
                raise UserError(f"{data} is missing or cut short and the replay cannot be read.")

    def _file_sizes(self) -> dict[str, int]:
        sizes = {"counters": 2 * np.dtype(np.int64).itemsize}
        for name, (shape, dtype) in self._fields.items():
            row = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
            sizes[name] = self._envs * self._rows * row
        return sizes

    def _create(self, meta: Path) -> None:
        """Create the files, then their description: a folder without one is incomplete."""
        sizes = self._file_sizes()
        disk.require_space(self._folder, sum(sizes.values()), self._envs * self._rows)
        created: list[Path] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = disk.lock(self._folder)
            for name, size in sizes.items():
                created.append(self._path(name))
                disk.allocate(self._path(name), size)
            created.append(meta.with_suffix(".tmp"))
            created[-1].write_text(json.dumps(self._meta(), indent=1))
            os.replace(created[-1], meta)
        except OSError as error:
            for path in created:
                path.unlink(missing_ok=True)
            raise UserError(
                f"The replay of {disk.gigabytes(sum(sizes.values()))} cannot be created in "
                f"{self._folder}: {error.strerror}."
            ) from error


def _fields(spec: EnvSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name, shape and dtype of the parts of a row."""
    return {
        **{f"obs.{name}": (tuple(shape), dtype) for name, (shape, dtype) in spec.obs.items()},
        "prev_action": ((spec.action_dim,), "float32"),
        "reward": ((), "float32"),
        "is_first": ((), "bool"),
        "is_terminal": ((), "bool"),
        "episode": ((), "int64"),
    }


def _flatten(row: Timestep, episode: np.ndarray) -> dict[str, np.ndarray]:
    values = {f"obs.{name}": value for name, value in row.obs.items()}
    for name in ("prev_action", "reward", "is_first", "is_terminal"):
        values[name] = getattr(row, name)
    return {**values, "episode": episode}


def _gather(values: dict[str, np.ndarray]) -> Timestep:
    obs = {k.removeprefix("obs."): x for k, x in values.items() if k.startswith("obs.")}
    return Timestep(obs=obs, **{k: x for k, x in values.items() if not k.startswith("obs.")})


def _described(meta: dict[str, Any]) -> dict[str, str]:
    """The description of a replay as texts, for comparison and for error messages."""
    fields = {
        name: f"{dtype}{tuple(int(n) for n in shape)}"
        for name, (shape, dtype) in meta["fields"].items()
    }
    rest = {"rows per environment": "rows", "environments": "envs", "format": "format"}
    return {**fields, **{label: str(meta[key]) for label, key in rest.items()}}
