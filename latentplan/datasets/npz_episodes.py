"""Episodes in npz files, one file per episode."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentplan.datasets.episodes import OBSERVATIONS, Episode, checked
from latentplan.types import UserError

KEYS = (
    *(*OBSERVATIONS, "action", "action_groups", "reward"),
    *("terminated", "truncated", "is_terminal"),
)
# A damaged file makes numpy and zipfile raise many types of errors.
_DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError)


class NpzEpisodes:
    """The episodes of all ``.npz`` files in a folder, in the order of their names.

    Raises:
        UserError: there is no such folder, or no npz file in it. Iterating raises the errors of
            :func:`latentplan.datasets.episodes.checked`.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder.")
        self._paths = sorted(folder.glob("*.npz"))
        if not self._paths:
            raise UserError(f"{folder} has no .npz files.")

    def __iter__(self) -> Iterator[Episode]:
        for path in self._paths:
            yield checked(str(path), _read(path))


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that an episode may have. Pickled objects are refused."""
    try:
        with zipfile.ZipFile(path):  # np.load would also read other kinds of files
            pass
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in KEYS if key in file}
    except _DAMAGE as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
