"""Replay on disk: one memory-mapped ring of rows per environment.

Rows are numbered per environment from 0; row ``i`` lives in slot ``i % slots``. The last ``rows``
of them can be sampled, and the others are spare. Counters, which are mapped from a file in the
folder, say which rows are valid::

    row    0 .......... touched - slots ... cursor - rows ......... cursor ........ touched
           overwritten           | spare            | can be sampled | dropped on resume |

``cursor`` is the next row to write. ``touched`` is the end of the slots that were ever written. It
is larger than ``cursor`` while a row is being written. It is also larger after a resume from a
checkpoint that is older than the folder, since the rows after the checkpoint are dropped. They
overwrote spare rows, so that a run whose replay is full goes on bit for bit too. Only where they
are more than the spare rows, some rows that could be sampled at the checkpoint are lost.

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
SPARE_FRACTION = 1 / 16  # of the rows that can be sampled
SPARE_ROWS_MIN = 1000  # per environment; an episode of dm_control has 1001 rows at most
_CHUNK_ROWS = 64  # rows whose checksums are computed at once; their copies stay in the cache


class Replay:
    """The last ``capacity // envs`` rows of each environment, for one thread of one process.

    Creates ``folder`` with files of their final size, or reopens it with its rows.

    Raises:
        UserError: the folder holds rows of another shape or is in use by another run, or the disk
            is too small. The folder stays as it was.
    """

    def __init__(
        self, folder: Path, spec: EnvSpec, *, capacity: int, envs: int, plans: bool = False
    ) -> None:
        if capacity < envs:
            raise UserError(f"replay.capacity={capacity} has no row for each of {envs} envs.")
        self._folder = Path(folder)
        self._envs, self._rows = envs, capacity // envs
        self._files = ReplayFiles(
            self._folder,
            row_fields(spec, plans),
            envs,
            self._rows,
            _spare_rows(self._rows),
            spec.action_groups,
        )
        self._slots = self._files.slots
        self._counters, self._flat = self._files.counters, self._files.fields
        self._rings = {
            name: flat.reshape(envs, self._slots, *flat.shape[1:])
            for name, flat in self._flat.items()
        }
        self._shapes = {name: (envs, *ring.shape[2:]) for name, ring in self._rings.items()}
        self._no_plan = {
            name: np.zeros(shape, np.float32)
            for name, shape in self._shapes.items()
            if name.startswith("prev_plan.")
        }
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
    def size_bytes(spec: EnvSpec, capacity: int, envs: int, plans: bool = False) -> int:
        """Bytes on disk of a new replay, with its spare rows."""
        rows = capacity // envs
        fields = row_fields(spec, plans)
        return envs * (rows + _spare_rows(rows)) * sum(row_bytes(fields).values())

    def __len__(self) -> int:
        """Rows that can be sampled, over all environments."""
        return self._envs * (self._cursor - self._first) - self._damaged.count(self._first)

    @property
    def _first(self) -> int:
        """The oldest row that can be sampled."""
        return max(self._cursor - self._rows, self._touched - self._slots, 0)

    @property
    def spare_used(self) -> float:
        """The fraction of the spare rows that rows since the last flush have overwritten.

        At 1, further rows overwrite those that a run would sample if it went on from a checkpoint
        of that flush. The value is 0 while the replay is not full, and in a folder of an earlier
        version, which has no spare rows.
        """
        spare = self._slots - self._rows
        if self._cursor <= self._slots or not spare:
            return 0.0
        return (self._cursor - self._sealed) / spare

    def add(self, row: Timestep, episode: np.ndarray) -> None:
        """Append one row ``(N, ...)`` per environment, and the numbers of their episodes (N,).

        A replay with plans stores a row without one with a gain of 0. A replay without plans leaves
        them out.

        Raises:
            ValueError: a field has another shape than the replay's.
        """
        slot = self._cursor % self._slots
        values = {**self._no_plan, **row.parts(), "episode": episode}
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
        index = env * self._slots + (start + np.arange(length)) % self._slots
        values = {name: flat.take(index, axis=0) for name, flat in self._flat.items()}
        episode = values.pop("episode")
        return Timestep.from_parts(values), episode

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
        return Timestep.from_parts(rows)

    def clear(self) -> None:
        """Remove all rows; for a run that starts again in a folder without a checkpoint."""
        self._set_counters(0, min(self._touched, self._slots), 0)
        self._damaged = DamagedRows()

    def state_dict(self) -> dict[str, int]:
        return {"cursor": self._cursor, "rows": self._rows, "envs": self._envs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Return to the rows at the time of ``state``, without those that were overwritten since.

        Every row is compared with its checksum, and its numbers must be finite. A warning names the
        damaged ones, which are never sampled. Damaged counters are replaced by those of ``state``,
        with a warning.

        Raises:
            UserError: the folder holds fewer rows than at the time of the checkpoint.
        """
        if (state["rows"], state["envs"]) != (self._rows, self._envs):
            raise UserError(
                f"The checkpoint belongs to a replay of {state['envs']} x {state['rows']} rows, "
                f"but {self._folder} holds {self._envs} x {self._rows}."
            )
        cursor = state["cursor"]
        if self._counters_intact:
            self._check_unused_slots()
        else:
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
        touched, sealed = min(self._touched, cursor + self._slots), min(self._sealed, cursor)
        self._set_counters(cursor, touched, sealed)
        self._damaged = self._find_damaged_rows()
        if self._damaged.last >= 0:
            log.warning(
                "The replay in %s is damaged: the rows that differ from their checksums, or whose "
                "numbers are not finite, are left out (%s; %d in all).",
                *(self._folder, self._damaged, self._damaged.count(0)),
            )

    def _check_unused_slots(self) -> None:
        """Warn of files that hold bytes in slots that were never written, and so have no row."""
        names = self._files.not_empty(self._touched) if self._touched < self._slots else []
        if names:
            log.warning(
                "The replay in %s is damaged where no row was written yet (%s). No row is lost.",
                *(self._folder, ", ".join(names)),
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
                slots = env * self._slots + rows % self._slots
                fields = [flat.take(slots, axis=0) for flat in self._flat.values()]
                yield env, rows, slots, row_checksums(fields, rows)

    def _find_damaged_rows(self) -> DamagedRows:
        """The rows that differ from their checksums, or hold a number that is not finite.

        Earlier versions stored what an environment returned, and one NaN in a batch makes its loss
        NaN.
        """
        damaged: list[list[np.ndarray]] = [[] for _ in range(self._envs)]
        for env, rows, slots, sums in self._sums(self._first, self._sealed):
            bad = sums != self._files.checksums[slots]
            for flat in self._flat.values():
                if flat.dtype == np.float32:
                    bad |= ~np.isfinite(flat[slots]).reshape(len(slots), -1).all(1)
            damaged[env].append(rows[bad])
        return DamagedRows([np.concatenate([np.empty(0, np.int64), *x]) for x in damaged])

    def _seal_earlier_rows(self) -> None:
        """Compute the checksums of rows that an earlier version wrote.

        Raises:
            UserError: the counters are damaged.
        """
        cursor, touched = self._counters[CURSOR], self._counters[TOUCHED]
        if not 0 <= cursor <= touched <= cursor + self._slots:
            raise UserError(f"The counters of the replay in {self._folder} are damaged.")
        log.info(
            "The replay in %s is of an earlier version: its rows get their checksums now.",
            self._folder,
        )
        self._set_counters(cursor, touched, 0)
        self.flush()
        self._files.describe()


def _spare_rows(rows: int) -> int:
    """Spare rows per environment of a new replay. A small replay is not more than doubled."""
    return min(rows, max(int(rows * SPARE_FRACTION), SPARE_ROWS_MIN))
