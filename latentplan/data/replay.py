"""Replay on disk: one memory-mapped ring of rows per environment.

Rows are numbered per environment from 0; row ``i`` lives in slot ``i % rows``. Counters, which are
mapped from a file in the folder, say which rows are valid::

    row       0 ........ touched - rows ........ cursor ........ touched
              overwritten           | can be sampled | dropped on resume |

``cursor`` is the next row to write. ``touched`` is the end of the slots that were ever written. It
is larger than ``cursor`` while a row is being written. It is also larger after a resume from a
checkpoint that is older than the folder: the rows after the checkpoint are dropped, and the rows
that they overwrote stay lost.

``sealed`` is the end of the rows that have a checksum. :meth:`Replay.flush` computes them, so that
adding a row takes no longer. :meth:`Replay.load_state_dict` compares them with the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentplan.data.checksums import DamagedRows, row_checksums
from latentplan.data.files import CURSOR, SEALED, TOUCHED, ReplayFiles, row_bytes, row_fields
from latentplan.types import EnvSpec, Timestep, UserError

log = logging.getLogger("latentplan")
_CHUNK_ROWS = 64  # rows whose checksums are computed at once; their copies stay in the cache


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
        self._files = ReplayFiles(self._folder, row_fields(spec), envs, self._rows)
        self._counters, self._flat = self._files.counters, self._files.fields
        self._rings = {
            name: flat.reshape(envs, self._rows, *flat.shape[1:])
            for name, flat in self._flat.items()
        }
        self._shapes = {name: (envs, *ring.shape[2:]) for name, ring in self._rings.items()}
        self._damaged = DamagedRows()
        self._cursor = self._touched = self._sealed = 0
        self._counters_intact = True
        if self._files.earlier:
            self._seal_earlier_rows()
        elif self._counters.intact():
            counts = (self._counters[index] for index in (CURSOR, TOUCHED, SEALED))
            self._cursor, self._touched, self._sealed = counts
        else:
            self._counters_intact = False  # `load_state_dict` replaces them

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether ``folder`` holds a replay, which would be reopened."""
        return (folder / "replay.json").exists()

    @staticmethod
    def size_bytes(spec: EnvSpec, capacity: int) -> int:
        """Bytes on disk of ``capacity`` rows."""
        return capacity * sum(row_bytes(row_fields(spec)).values())

    def __len__(self) -> int:
        """Rows that can be sampled, over all environments."""
        return self._envs * (self._cursor - self._first) - self._damaged.count(self._first)

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
        for name, shape in self._shapes.items():
            if np.shape(values[name]) != shape:
                raise ValueError(
                    f"{name}: got {np.shape(values[name])} for {self._envs} x {shape[1:]}"
                )
        # In this order an incomplete row is in neither counter if the process ends in between.
        self._touched = self._counters[TOUCHED] = max(self._touched, self._cursor + 1)
        for name, ring in self._rings.items():
            ring[:, slot] = values[name]
        self._cursor = self._counters[CURSOR] = self._cursor + 1

    def ready(self, length: int) -> bool:
        """Whether a window of ``length`` rows can be sampled."""
        if self._damaged.last < self._first:
            return self._cursor - self._first >= length
        return bool(self._damaged.windows(length, self._first, self._cursor)[2].any())

    def sample(
        self, batch: int, length: int, rng: np.random.Generator
    ) -> tuple[Timestep, np.ndarray]:
        """Draw ``batch`` windows of ``length`` rows, uniformly over environments and starts.

        A window is ``length`` consecutive rows of one environment. It may contain the end of an
        episode (``is_first`` marks the next one), but never the write head, and never a damaged
        row.

        Returns:
            Copies of the rows ``(B, T, ...)``, and the number of each row's episode ``(B, T)``
            int64.

        Raises:
            ValueError: there is no such window yet (:meth:`ready`).
        """
        if not self.ready(length):
            raise ValueError(f"no window of {length} rows among {len(self)}")
        if self._damaged.last < self._first:
            env = rng.integers(self._envs, size=(batch, 1))
            start = rng.integers(self._first, self._cursor - length + 1, size=(batch, 1))
        else:
            env, start = self._damaged.draw(batch, length, self._first, self._cursor, rng)
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
            UserError: the first rows were overwritten, or a row is damaged.
        """
        if self._first:
            raise UserError(
                f"The replay in {self._folder} no longer has the run's first {self._first} rows: "
                "a larger replay.capacity would keep them."
            )
        if self._damaged.last >= 0:
            raise UserError(
                f"The replay in {self._folder} has damaged rows, so the run's history is "
                f"incomplete ({self._damaged})."
            )
        rows = {name: ring[:, : self._cursor].copy() for name, ring in self._rings.items()}
        del rows["episode"]
        return _gather(rows)

    def clear(self) -> None:
        """Remove all rows; for a run that starts again in a folder without a checkpoint."""
        self._set_counters(0, 0, 0)
        self._damaged = DamagedRows()

    def state_dict(self) -> dict[str, int]:
        return {"cursor": self._cursor, "rows": self._rows, "envs": self._envs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Return to the rows at the time of ``state``, without those that were overwritten since.

        Every row is compared with its checksum. A warning names the damaged ones, which are never
        sampled. Damaged counters are replaced by those of ``state``, with a warning.

        Raises:
            UserError: the folder holds fewer rows than at the time of the checkpoint.
        """
        if (state["rows"], state["envs"]) != (self._rows, self._envs):
            raise UserError(
                f"The checkpoint belongs to a replay of {state['envs']} x {state['rows']} rows, "
                f"but {self._folder} holds {self._envs} x {self._rows}."
            )
        cursor = state["cursor"]
        if not self._counters_intact:
            log.warning(
                "The counters of the replay in %s are damaged and are taken from the checkpoint.",
                self._folder,
            )
            # Rows that were overwritten since are then found by their checksums.
            self._cursor = self._touched = self._sealed = cursor
        if cursor > self._cursor:
            raise UserError(
                f"The replay in {self._folder} has {self._cursor} rows per environment but the "
                f"checkpoint was saved after {cursor}: bring the folder back, or choose another "
                "run_dir."
            )
        touched, sealed = min(self._touched, cursor + self._rows), min(self._sealed, cursor)
        self._set_counters(cursor, touched, sealed)
        self._damaged = self._find_damaged_rows()
        if self._damaged.last >= 0:
            log.warning(
                "The replay in %s is damaged: the rows that differ from their checksums are left "
                "out (%s; %d in all).",
                *(self._folder, self._damaged, self._damaged.count(0)),
            )

    def flush(self) -> None:
        """Give new rows their checksums and write everything to the disk.

        The rows then survive a power cut.
        """
        if self._sealed < self._cursor:
            for _, _, slots, sums in self._sums(max(self._sealed, self._first), self._cursor):
                self._files.checksums[slots] = sums
            self._set_counters(self._cursor, self._touched, self._cursor)
        self._files.flush()

    def close(self) -> None:
        """Flush and unlock the folder. The object cannot be used afterwards."""
        self.flush()
        self._rings, self._flat = {}, {}
        self._files.close()

    def _set_counters(self, cursor: int, touched: int, sealed: int) -> None:
        self._cursor, self._touched, self._sealed = cursor, touched, sealed
        self._counters[CURSOR], self._counters[TOUCHED] = cursor, touched
        self._counters[SEALED] = sealed
        self._counters_intact = True

    def _sums(
        self, begin: int, end: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Environment, numbers (K,), slots (K,) and checksums (K,) of rows, in small portions."""
        for env in range(self._envs):
            for start in range(begin, end, _CHUNK_ROWS):
                rows = np.arange(start, min(start + _CHUNK_ROWS, end))
                slots = env * self._rows + rows % self._rows
                fields = [flat.take(slots, axis=0) for flat in self._flat.values()]
                yield env, rows, slots, row_checksums(fields, rows)

    def _find_damaged_rows(self) -> DamagedRows:
        """Compare all rows that have a checksum with it."""
        damaged: list[list[np.ndarray]] = [[] for _ in range(self._envs)]
        for env, rows, slots, sums in self._sums(self._first, self._sealed):
            damaged[env].append(rows[sums != self._files.checksums[slots]])
        return DamagedRows([np.concatenate([np.empty(0, np.int64), *x]) for x in damaged])

    def _seal_earlier_rows(self) -> None:
        """Compute the checksums of rows that an earlier version wrote.

        Raises:
            UserError: the counters are damaged.
        """
        cursor, touched = self._counters[CURSOR], self._counters[TOUCHED]
        if not 0 <= cursor <= touched <= cursor + self._rows:
            raise UserError(f"The counters of the replay in {self._folder} are damaged.")
        log.info(
            "The replay in %s is of an earlier version: its rows get their checksums now.",
            self._folder,
        )
        self._set_counters(cursor, touched, 0)
        self.flush()
        self._files.describe()


def _flatten(row: Timestep, episode: np.ndarray) -> dict[str, np.ndarray]:
    values = {f"obs.{name}": value for name, value in row.obs.items()}
    for name in ("prev_action", "reward", "is_first", "is_terminal"):
        values[name] = getattr(row, name)
    return {**values, "episode": episode}


def _gather(values: dict[str, np.ndarray]) -> Timestep:
    obs = {k.removeprefix("obs."): x for k, x in values.items() if k.startswith("obs.")}
    return Timestep(obs=obs, **{k: x for k, x in values.items() if not k.startswith("obs.")})
