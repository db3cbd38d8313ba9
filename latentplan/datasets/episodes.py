"""Episodes of other programs: their checks, and the folder of rows that training reads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentplan.data.replay import Replay
from latentplan.envs.action_spaces import MOST_CHOICES
from latentplan.envs.actions import one_hot
from latentplan.envs.observations import is_image
from latentplan.types import EnvSpec, Timestep, UserError

TOLERANCE = 1e-5  # beyond [-1, 1], for actions that were scaled with rounding
OBSERVATIONS = ("image", "vector")


class Episode(NamedTuple):
    """An episode of T decisions. Observation t is what action t was chosen for."""

    obs: dict[str, np.ndarray]  # (T+1, H, W, 3) uint8 images, (T+1, dim) float32 vectors
    action: np.ndarray  # (T, A) float32 in [-1, 1]; discrete ones are one-hot
    reward: np.ndarray  # (T,) float32, received for action t
    terminated: bool  # nothing can be earned after the last observation
    action_groups: tuple[int, ...] = ()  # numbers of choices of discrete actions

    @property
    def spec(self) -> EnvSpec:
        """Its observations and actions. The action repeat is not known, and 1 here."""
        obs = {name: (x.shape[1:], x.dtype.name) for name, x in self.obs.items()}
        return EnvSpec(obs, self.action.shape[1], 1, action_groups=self.action_groups)

    def rows(self) -> Iterator[Timestep]:
        """Its T + 1 rows (1, ...), aligned as in `latentplan.types`."""
        end = len(self.reward)
        action = np.concatenate([np.zeros_like(self.action[:1]), self.action])
        reward = np.concatenate([np.zeros(1, np.float32), self.reward])
        for t in range(end + 1):
            yield Timestep(
                {name: x[t : t + 1] for name, x in self.obs.items()},
                action[t : t + 1],
                reward[t : t + 1],
                np.array([t == 0]),
                np.array([t == end and self.terminated]),
            )


def checked(name: str, arrays: Mapping[str, np.ndarray]) -> Episode:
    """Make an episode of arrays.

    Args:
        name: of the episode, for messages.
        arrays: ``action`` (T, A), ``reward`` (T,), ``image`` (T+1, H, W, 3) and/or ``vector``
            (T+1, dim), and ``terminated`` (T,), besides which there may be ``truncated`` (T,), or
            ``is_terminal`` (T+1,). With ``action_groups`` (G,), the numbers of choices of discrete
            actions, ``action`` (T,) or (T, G) holds integers from 0 on.

    Raises:
        UserError: an array is missing, or has another shape or type, a number is not finite, an
            action is outside [-1, 1], or the episode goes on after its end.
    """
    groups = _groups(name, arrays)
    action = _chosen(name, arrays, groups) if groups else _numbers(name, arrays, "action", 2)
    if not action.size:
        raise UserError(f"{name}: action has the shape {action.shape} and holds no decision.")
    if (most := np.abs(action).max()) > 1 + TOLERANCE:
        raise UserError(
            f"{name}: an action of {most:g} is outside [-1, 1]. Scale actions by the bounds of the "
            "environment: 2 * (action - low) / (high - low) - 1."
        )
    length = len(action)
    obs = {key: _observation(name, arrays, key) for key in OBSERVATIONS if key in arrays}
    if not obs:
        raise UserError(f"{name} has neither image nor vector.")
    reward = _numbers(name, arrays, "reward", 1)
    for key, x, rows in (
        ("reward", reward, length),
        *((key, x, length + 1) for key, x in obs.items()),
    ):
        if len(x) != rows:
            raise UserError(
                f"{name}: {key} has {len(x)} rows but must have {rows}, because action has "
                f"{length}: there is one observation more than actions, and a reward per action."
            )
    ended = _terminated(name, arrays, length)
    return Episode(obs, np.clip(action, -1, 1), reward, ended, groups)


def _groups(name: str, arrays: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The numbers of choices of discrete actions; (): actions are continuous."""
    x = arrays.get("action_groups")
    if x is None:
        action = arrays.get("action")
        if action is not None and action.ndim == 1 and action.dtype.kind in "iu":
            raise UserError(
                f"{name}: action holds one integer per decision. Discrete actions need an array "
                "action_groups, such as [3] for the choices 0, 1 and 2."
            )
        return ()
    if x.dtype.kind not in "iu" or x.ndim != 1 or not x.size or not (x >= 1).all():
        raise UserError(f"{name}: action_groups must be positive integers (G,), not {x}.")
    if x.sum() > MOST_CHOICES:
        raise UserError(f"{name}: there are more than {MOST_CHOICES} discrete actions.")
    return tuple(map(int, x))


def _chosen(name: str, arrays: Mapping[str, np.ndarray], groups: tuple[int, ...]) -> np.ndarray:
    """Discrete actions as one-hot vectors (T, A) float32."""
    if "action" not in arrays:
        raise UserError(f"{name} has no array action.")
    x = arrays["action"]
    x = x[:, None] if x.ndim == 1 else x
    if x.dtype.kind not in "iu" or x.ndim != 2 or x.shape[1] != len(groups):
        raise UserError(
            f"{name}: action must be integers (T, {len(groups)}) as action_groups says, not "
            f"{x.dtype} {x.shape}."
        )
    if x.size and not ((x >= 0) & (x < np.array(groups))).all():
        raise UserError(f"{name}: an action is not one of the choices that action_groups counts.")
    return one_hot(x.astype(np.int64), groups)


def _terminated(name: str, arrays: Mapping[str, np.ndarray], length: int) -> bool:
    """Whether the last row is terminal. No other row may be the last of an episode."""
    if "is_terminal" in arrays:
        return bool(_flags(name, arrays, "is_terminal", length + 1)[-1])
    terminated = _flags(name, arrays, "terminated", length)
    if "truncated" in arrays:
        _flags(name, arrays, "truncated", length)
    return bool(terminated[-1])


def _flags(name: str, arrays: Mapping[str, np.ndarray], key: str, rows: int) -> np.ndarray:
    if key not in arrays:
        raise UserError(f"{name} has no array {key} (or is_terminal, with a row per observation).")
    x = arrays[key]
    if x.dtype != np.bool_ or x.shape != (rows,):
        raise UserError(f"{name}: {key} must be bool ({rows},), not {x.dtype} {x.shape}.")
    if x[:-1].any():
        raise UserError(
            f"{name}: {key} is true in row {int(x.argmax())}, before the last one, {rows - 1}: "
            "write each episode by itself."
        )
    return x


def _observation(name: str, arrays: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    if key == "vector":
        return _numbers(name, arrays, key, 2)
    x = arrays[key]
    if x.ndim != 4 or not len(x) or not is_image(x[0]):
        raise UserError(
            f"{name}: image must be uint8 (T+1, height, width, 3), not {x.dtype} {x.shape}."
        )
    return x


def _numbers(name: str, arrays: Mapping[str, np.ndarray], key: str, axes: int) -> np.ndarray:
    """An array of real numbers with this many axes, as float32."""
    if key not in arrays:
        raise UserError(f"{name} has no array {key}.")
    x = arrays[key]
    if x.dtype.kind not in "fiu" or x.ndim != axes:
        kind = {1: "(T,)", 2: "with two axes, time and numbers"}[axes]
        raise UserError(f"{name}: {key} must be numbers {kind}, not {x.dtype} {x.shape}.")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    finite = np.isfinite(x).all(tuple(range(1, axes)))
    if not finite.all():
        raise UserError(f"{name}: {key} is not finite in row {int(finite.argmin())}.")
    return x


def write(episodes: Iterable[Episode], out: Path) -> dict[str, Any]:
    """Write episodes into a new folder, which ``train.offline`` reads.

    Args:
        episodes: is read twice. The first time all episodes are checked and counted.
        out: the folder. It must not exist, or be empty.

    Returns:
        A summary in plain values.

    Raises:
        UserError: an episode is wrong or has other shapes than the first one, there is none, or
            the folder cannot be written. Nothing is left in it then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another folder for --out.")
    spec: EnvSpec | None = None
    lengths: list[int] = []
    returns: list[float] = []
    for episode in episodes:
        spec = episode.spec if spec is None else spec
        if episode.spec != spec:
            raise UserError(
                f"Episode {len(lengths)} has {_described(episode.spec)}, but those before it have "
                f"{_described(spec)}."
            )
        lengths.append(len(episode.reward) + 1)
        returns.append(float(episode.reward.sum()))
    if spec is None:
        raise UserError("There are no episodes to import.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}.") from error
    try:
        replay = Replay(scratch / "replay", spec, capacity=sum(lengths), envs=1)
        for number, episode in enumerate(episodes):
            for row in episode.rows():
                replay.add(row, np.array([number]))
        replay.close()
        os.replace(scratch / "replay", out)
    finally:
        shutil.rmtree(scratch)
    return {
        "folder": str(out),
        "episodes": len(lengths),
        "rows": sum(lengths),
        "spec": spec.to_dict()["obs"] | {"action": [spec.action_dim]},
        "mean_return": float(np.mean(returns)),
    }


def _described(spec: EnvSpec) -> str:
    obs = [f"{name} {dtype}{shape}" for name, (shape, dtype) in spec.obs.items()]
    groups = f" of groups {spec.action_groups}" if spec.action_groups else ""
    return ", ".join([*obs, f"action ({spec.action_dim},){groups}"])
