"""The data types that all folders share, the legend of their shapes, and how time is aligned.

Symbols (the authority for every shape comment in the code)::

    B sequences   T time   N flat batch (environments, or B*T starts)   H imagination horizon
    K candidates   P plan horizon   R planned rows
    M ensemble members   A action   X embedding
    D deterministic   S groups x C classes   F = D + S*C features

Alignment. A row holds what was true on arriving at time t, so that nothing is shifted::

    row t:    obs[t]   prev_action[t]   reward[t]   is_first[t]   is_terminal[t]
               o0          0               0            1             0
               o1          a0              r1           0             0           a0: o0 -> o1
               o2          a1              r2           0             0 or 1

    imagined:  z0 --a0--> z1 --a1--> z2 ... zH         latent (N, H+1, ...), z0 is the start
                     r1,c1,u1   r2,c2,u2               reward, cont, uncertainty, action (N, H):
                                                       index h is "arriving at z[h+1]"

An environment that ended is reset on the *next* step, so its last observation is an ordinary row,
and the last row of one episode is followed by the first row of the next.
Images are ``(..., height, width, 3)`` uint8 from renderer to replay to encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # environment workers read this module and must start without torch
    import torch
    from torch import Tensor

    Array = Any  # np.ndarray from environments and replay, Tensor on the learner's device


class UserError(Exception):
    """A mistake that the user can correct. The command line shows its sentence and exits with 2."""


MOST_PARTS = 1000  # of a value that is shown in a message


def shown(value: object, length: int = 100, *, quoted: bool = True) -> str:
    """A value for the sentence of a `UserError`: on one line, and cut after ``length`` characters.

    Args:
        value: any value, which may come from a stranger's file.
        length: characters.
        quoted: put a text into quotes.
    """
    if _has_many_parts(value):
        return "a very large value"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a very deep list
        return "a very large value"
    if isinstance(value, str) and not quoted:
        text = value if value.isprintable() else text[1:-1]
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _has_many_parts(value: object) -> bool:
    """Whether a value has more than ``MOST_PARTS`` parts, each counted as often as it occurs.

    A small file can hold lists of lists that contain the same list twice, whose text is endless.
    """
    parts, count = [value], 0
    while parts:
        part = parts.pop()
        count += 1
        if isinstance(part, dict):
            parts += [*part.keys(), *part.values()][:MOST_PARTS]
        elif isinstance(part, list | tuple | set | frozenset):
            parts += list(part)[:MOST_PARTS]
        if count + len(parts) > MOST_PARTS:
            return True
    return False


class Entry(NamedTuple):
    """One entry of an environment's observations, and how it is used."""

    path: tuple[str | int, ...]  # the keys that lead to it; (): the observation itself
    use: str  # numbers, one_hot, unused, or the axes of an image, as in envs.observations
    shape: tuple[int, ...]
    dtype: str
    counts: tuple[int, ...] = ()  # of one_hot: the number of choices of each of its integers
    starts: tuple[int, ...] = ()  # of one_hot: the first choice of each of its integers
    high: int = 255  # of an image: the value of white, 255 or 1

    @classmethod
    def from_list(cls, plain: Sequence[Any]) -> Entry:
        """Read the values of an entry, whose tuples have become lists in a file."""
        values: list[Any] = [tuple(x) if isinstance(x, list) else x for x in plain]
        return cls(*values)


class EnvSpec(NamedTuple):
    """The observations and actions of an environment, in plain values that can be saved as JSON.

    ``obs`` maps a name to ``(shape, dtype name)``; a uint8 entry of shape (height, width, 3) is an
    image, a float32 entry of shape (dim,) a vector. Actions are ``(action_dim,)`` in [-1, 1].
    Discrete actions are one-hot vectors, one behind the other where there are several choices.
    """

    obs: dict[str, tuple[tuple[int, ...], str]]
    action_dim: int
    repeat: int  # frames per decision
    action_low: tuple[float, ...] = ()  # (A,) the environment's actions for -1
    action_high: tuple[float, ...] = ()  # and for 1; both are empty where they are not known. Of
    # discrete actions: the first and last of each group
    action_shape: tuple[int, ...] | None = None  # in the environment; None: one axis
    action_dtype: str = "float64"  # in the environment
    entries: tuple[Entry, ...] = ()  # of a Gymnasium environment's own observations
    action_groups: tuple[int, ...] = ()  # numbers of choices of discrete actions, whose sum is A;
    # empty: actions are continuous
    action_names: tuple[str, ...] = ()  # (A,) of discrete actions, where the environment has some

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file; :meth:`from_dict` reads them."""
        obs = {name: [list(shape), dtype] for name, (shape, dtype) in self.obs.items()}
        parts = [[list(x) if isinstance(x, tuple) else x for x in entry] for entry in self.entries]
        return self._asdict() | {"obs": obs, "entries": parts}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> EnvSpec:
        """Read what :meth:`to_dict` of this or an earlier version wrote."""
        obs = {name: (tuple(shape), dtype) for name, (shape, dtype) in plain["obs"].items()}
        names = ("action_low", "action_high", "action_groups", "action_names")
        lists = {k: tuple(plain.get(k, ())) for k in names}
        entries = tuple(Entry.from_list(x) for x in plain.get("entries", ()))
        shape = plain.get("action_shape")
        shape = None if shape is None else tuple(shape)
        return cls(**{**plain, "obs": obs, **lists, "entries": entries, "action_shape": shape})

    @property
    def images(self) -> list[str]:
        return [name for name, (shape, _) in self.obs.items() if len(shape) == 3]

    @property
    def vectors(self) -> list[str]:
        return [name for name, (shape, _) in self.obs.items() if len(shape) == 1]


class PlanTarget(NamedTuple):
    """The planner's choice for a state, which the policy is moved towards."""

    mean: Array  # (..., A) float32, the mean of the best candidates
    std: Array  # (..., A) float32, their standard deviation
    gain: Array  # (...,) float32, score above that of the policy's mean action; 0: there is no plan


class Timestep(NamedTuple):
    """Rows of experience: ``(N, ...)`` from environments, ``(B, T, ...)`` from replay."""

    obs: dict[str, Array]
    prev_action: Array  # (..., A) float32, the action that led here; 0 where is_first
    reward: Array  # (...,) float32, received on arriving here; 0 where is_first
    is_first: Array  # (...,) bool, this row starts an episode
    is_terminal: Array  # (...,) bool, nothing can be earned after this row
    prev_plan: PlanTarget | None = None  # the plan that chose prev_action, if plans are stored

    def map(self, f: Callable[[Array], Array]) -> Timestep:
        """Apply ``f`` to every array."""
        return Timestep.from_parts({name: f(x) for name, x in self.parts().items()})

    def parts(self) -> dict[str, Array]:
        """Every array by its name: ``obs.image``, ``reward``, ``prev_plan.mean`` and so on."""
        parts = {f"obs.{name}": x for name, x in self.obs.items()}
        parts |= {name: getattr(self, name) for name in _PLAIN_FIELDS}
        if self.prev_plan is not None:
            parts |= {f"prev_plan.{name}": x for name, x in self.prev_plan._asdict().items()}
        return parts

    @staticmethod
    def from_parts(parts: Mapping[str, Array]) -> Timestep:
        """The row whose :meth:`parts` are given."""
        obs = {k.removeprefix("obs."): x for k, x in parts.items() if k.startswith("obs.")}
        plan = {k.removeprefix("prev_plan."): x for k, x in parts.items() if "prev_plan." in k}
        plain = {name: parts[name] for name in _PLAIN_FIELDS}
        return Timestep(obs, **plain, prev_plan=PlanTarget(**plan) if plan else None)

    def to(self, device: torch.device | str) -> Timestep:
        """Every array as a tensor on ``device``; tensors that are there already are not copied."""
        import torch

        return self.map(lambda x: torch.as_tensor(x).to(device, non_blocking=True))


_PLAIN_FIELDS = [name for name in Timestep._fields if name not in ("obs", "prev_plan")]


def join(rows: Sequence[Timestep], how: Callable[[list[Array]], Array]) -> Timestep:
    """Join rows array by array with ``how``, which stacks or concatenates."""
    parts = [row.parts() for row in rows]
    return Timestep.from_parts({name: how([x[name] for x in parts]) for name in parts[0]})


class Latent(NamedTuple):
    """The state of the world model."""

    deter: Tensor  # (..., D)
    stoch: (
        Tensor  # (..., S, C) one-hot samples (straight-through); softer during world.anneal_updates
    )

    def map(self, f: Callable[[Tensor], Tensor]) -> Latent:
        """Apply ``f`` to both parts."""
        return Latent(f(self.deter), f(self.stoch))


class StepNoise(NamedTuple):
    """The randomness of model steps, drawn ahead so that rollouts can share it."""

    member: Tensor | None  # (..., N) int64, the member that moves each row; None: member i moves
    # the i-th of M equal blocks of rows, so that only one head is evaluated per row
    uniform: Tensor  # (..., N, S) in [0, 1), one per categorical group

    def at(self, h: int) -> StepNoise:
        """The noise of step h, where the leading axis is that of steps."""
        return StepNoise(None if self.member is None else self.member[h], self.uniform[h])


class Prediction(NamedTuple):
    """The model's prediction for one action: the next state, and what is received there."""

    latent: Latent
    reward: Tensor  # (N,)
    cont: Tensor  # (N,) probability that the episode continues
    uncertainty: Tensor | None  # (N,) disagreement of the ensemble about ``latent``, if measured


class WorldLoss(NamedTuple):
    """The losses of a world model on a replayed batch (B, T), and its posterior states."""

    terms: dict[str, Tensor]  # () each, weighted; their sum is the loss
    latent: Latent  # (B, T) posterior
    high_uncertainty: Tensor  # () 95th percentile over the rows, which sets the scale of bonuses
    metrics: dict[str, Tensor]


class Choice(NamedTuple):
    """An action and the standard-normal noise that made it."""

    action: Tensor  # (N, A)
    noise: Tensor  # (N, A)


class Rollout(NamedTuple):
    """An imagined trajectory, aligned as in the diagram above."""

    latent: Latent  # (N, H+1, ...)
    choice: Choice  # (N, H, A), the actions taken and their noise
    reward: Tensor  # (N, H)
    cont: Tensor  # (N, H)
    uncertainty: Tensor | None  # (N, H)
