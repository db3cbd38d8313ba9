"""Episodes of Minari data sets, read with the library minari."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from latentplan.datasets.episodes import Episode, checked
from latentplan.envs.action_spaces import actions_of
from latentplan.envs.observations import image_axes
from latentplan.types import UserError

SPACES = ("observation_space", "action_space")


class MinariEpisodes:
    """The episodes of a data set on this machine.

    Observations are those of Gymnasium environments (`latentplan.envs.gym`): the image is the uint8
    (height, width, 3) entry, and the vector holds the other numbers, the entries of a Dict in the
    order of their names. Actions are scaled from the bounds of their Box to [-1, 1], and discrete
    ones are one-hot.

    Args:
        source: the folder of a data set, or its identifier, such as ``D4RL/pen/human-v2``.

    Raises:
        UserError: minari is not installed, there is no such data set, or its spaces are of another
            kind. Iterating raises the errors of :func:`latentplan.datasets.episodes.checked`.
    """

    def __init__(self, source: str) -> None:
        self._name = source
        self._data = _open(source)
        self._action = self._action_space()
        self._images, self._states = self._entries()

    def __iter__(self) -> Iterator[Episode]:
        for episode in self._data.iterate_episodes():
            name = f"Episode {episode.id} of {self._name}"
            arrays = {
                **self._observations(episode.observations),
                **self._actions(np.asarray(episode.actions)),
                "reward": np.asarray(episode.rewards),
                "terminated": np.asarray(episode.terminations, bool),
                "truncated": np.asarray(episode.truncations, bool),
            }
            yield checked(name, arrays)

    def _actions(self, recorded: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of an episode's actions (T, ...)."""
        space = self._action
        if isinstance(space, spaces.Box):
            low, high = space.low.reshape(-1), space.high.reshape(-1)
            action = recorded.astype(np.float64).reshape(-1, len(low))
            return {"action": 2 * (action - low) / (high - low) - 1}
        discrete = actions_of(space)
        groups = np.array(discrete.groups)
        action = recorded.reshape(-1, len(groups)) - np.array(discrete.low, np.int64)
        return {"action": action, "action_groups": groups}

    def _action_space(self) -> spaces.Box | spaces.Discrete | spaces.MultiDiscrete:
        space = self._data.action_space
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            return space
        if not isinstance(space, spaces.Box) or not space.is_bounded():
            raise UserError(
                f"{self._name} cannot be imported: its actions are {space}, and only a Box with "
                "finite bounds, Discrete and MultiDiscrete are supported."
            )
        if not (space.high > space.low).all():
            raise UserError(f"{self._name} cannot be imported: bounds of its actions are equal.")
        return space

    def _entries(self) -> tuple[list[str], list[str]]:
        """The names of the images and of the other entries of an observation, in order."""
        space = self._data.observation_space
        entries: dict[str, Any] = {"": space}
        if isinstance(space, spaces.Dict):
            entries = dict(space.spaces)
        for name, entry in entries.items():
            if not isinstance(entry, spaces.Box):
                raise UserError(
                    f"{self._name} cannot be imported: its observation {name} is {entry}, and only "
                    "a Box, or a Dict of them, is supported."
                )
        images = [x for x, entry in entries.items() if image_axes(entry) is not None]
        if len(images) > 1:
            raise UserError(
                f"{self._name} cannot be imported: it has several images ({', '.join(images)})."
            )
        return images, sorted(set(entries) - set(images))

    def _observations(self, recorded: Any) -> dict[str, np.ndarray]:
        entries = recorded if isinstance(recorded, Mapping) else {"": recorded}
        obs = {}
        if self._images:
            obs["image"] = np.asarray(entries[self._images[0]])
        parts = [np.asarray(entries[name]) for name in self._states]
        if parts:
            flat = [x.reshape(len(x), -1) for x in parts]
            obs["vector"] = np.concatenate(flat, axis=1)
        return obs


def _open(source: str) -> Any:
    """Open a data set.

    Raises:
        UserError: minari is not installed, or there is no data set that can be read.
    """
    try:
        import minari
        from minari.dataset.minari_storage import MinariStorage
        from minari.storage.datasets_root_dir import get_dataset_path
    except ImportError as error:
        raise UserError(
            "Minari data sets need the package minari: pip install -c constraints.txt -e "
            "'.[minari]'."
        ) from error
    try:
        folder = Path(source) if Path(source).is_dir() else Path(get_dataset_path(source))
        data = folder / "data" if (folder / "data").is_dir() else folder
        if not data.is_dir():
            raise UserError(
                f"{source} is neither a folder nor a Minari data set on this machine: fetch it "
                "with `minari download`."
            )
        described = MinariStorage.read_raw_metadata(data)
        if any(not isinstance(described.get(name), str) for name in SPACES):
            # Minari would build the environment that the data set names, which runs its code.
            raise UserError(
                f"{source} does not say what its observations and actions are ({SPACES[0]} and "
                f"{SPACES[1]} in metadata.json)."
            )
        return minari.MinariDataset(data)
    except UserError:
        raise
    except Exception as error:  # minari and its readers raise errors of many types
        raise UserError(f"The Minari data set {source} cannot be read: {error}.") from error
