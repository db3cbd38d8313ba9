"""The content of a checkpoint, checked before anything uses it.

A checkpoint may come from a stranger, or from a program that was not this one. Its CRC32 says that
the bytes are those that were saved, and nothing about what was saved. Values that are numbers,
names or tensors here have their types and bounds when :func:`read_agent` or :func:`read_training`
returns. The shapes of weights are compared with the agent's later, in ``runs/weights.py``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from latentplan.config.schema import Config
from latentplan.data.files import OBSERVATION_NAME
from latentplan.envs.observations import IMAGE_AXES, MOST_CLASSES, NUMBERS, ONE_HOT, UNUSED
from latentplan.types import Entry, EnvSpec, UserError, shown

MOST = 2**53  # largest count of frames, decisions, updates and rows
MOST_EPISODES = 2**40  # of one environment; their numbers are multiplied by that of environments
MOST_NUMBERS = 10**6  # of a vector, or of an action
MOST_ENTRIES = 10_000  # of the observations of an environment
LONGEST_SIDE = 2**14  # pixels of an image
SCHEDULES = ("log", "eval", "film")
_MT19937_NUMBERS = 624
_CUDA_BYTES = 2**16  # more than the state of a random generator has
_T = TypeVar("_T")
# A random generator refuses a state with many types of errors.
_REFUSALS = (ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError)


class _WrongError(Exception):
    """A value has another type, or is outside its bounds. The message says which."""


def read_agent(raw: object, path: Path, image_size: int) -> dict[str, Any]:
    """The part of a checkpoint that an agent needs.

    Args:
        raw: the content of any checkpoint, newest or kept.
        path: the checkpoint file, for error messages.
        image_size: pixels per side that the run's configuration gives its images.

    Returns:
        ``frames``, ``updates`` (None in a kept checkpoint), ``spec`` (an `EnvSpec`) and ``agent``
        (tensors by name).

    Raises:
        UserError: a value is missing or wrong. The message names it.
    """
    return _read(path, lambda: _agent_part(_mapping(raw, "content"), image_size))


def read_training(raw: object, path: Path, config: Config) -> dict[str, Any]:
    """A checkpoint that a run goes on from.

    Args:
        raw: the content of the checkpoint.
        path: the checkpoint file, for error messages.
        config: the configuration of the run.

    Returns:
        What ``Trainer.save`` wrote. ``spec`` is an `EnvSpec`. ``best_score`` is None, and
        ``faults`` and ``skipped_batches`` 0, where an earlier version saved none.

    Raises:
        UserError: a value is missing or wrong. The message names it.
    """

    def read() -> dict[str, Any]:
        content = _mapping(raw, "content")
        decisions = _count(content, "decisions")
        envs = config.env.num_envs
        episodes = _list(content.get("episodes"), "episodes", envs)
        return {
            **_agent_part(content, config.env.image_size),
            "decisions": decisions,
            "updates": _count(content, "updates"),
            "best_score": _number_or_none(content.get("best_score"), "best_score"),
            "episodes": [_integer(x, "episodes", MOST_EPISODES) for x in episodes],
            "optimizer": _optimizer(content.get("optimizer")),
            "ratio": _ratio(content.get("ratio"), decisions, config),
            "due": _due(content.get("due")),
            "faults": _integer(content.get("faults", 0), "faults"),
            "skipped_batches": _integer(content.get("skipped_batches", 0), "skipped_batches"),
            "replay": _replay(content),
            "random": _random(_mapping(content.get("random"), "random")),
            "sampler": _sampler(content.get("sampler")),
        }

    return _read(path, read)


def read_weights(raw: object, path: Path) -> tuple[int, dict[str, Tensor]]:
    """The frames and the agent's weights in a checkpoint of any task, newest or kept.

    Raises:
        UserError: a value is missing or wrong.
    """

    def read() -> tuple[int, dict[str, Tensor]]:
        content = _mapping(raw, "content")
        return _count(content, "frames"), _tensors(content.get("agent"), "agent")

    return _read(path, read)


def read_frames(raw: object, path: Path) -> int:
    """The environment frames of a run at a checkpoint.

    Raises:
        UserError: the value is missing or wrong.
    """
    return _read(path, lambda: _count(_mapping(raw, "content"), "frames"))


def read_replay_state(raw: object, path: Path) -> dict[str, int]:
    """The position of the replay at a checkpoint.

    Raises:
        UserError: a value is missing or wrong. The message names it.
    """
    return _read(path, lambda: _replay(_mapping(raw, "content")))


def _read(path: Path, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except _WrongError as error:
        raise UserError(f"{path} is damaged or is not a latentplan checkpoint: {error}.") from error


# --- plain values ---------------------------------------------------------------------------


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(type(key) is str for key in value):
        raise _WrongError(f"{name} is not a mapping of names to values")
    return value


def _list(value: object, name: str, length: int | None) -> list[Any] | tuple[Any, ...]:
    """A list of a length; None: of any length up to ``MOST_ENTRIES``."""
    if not isinstance(value, list | tuple):
        raise _WrongError(f"{name} is not a list")
    if len(value) != length and (length is not None or len(value) > MOST_ENTRIES):
        raise _WrongError(f"{name} is not a list of {length or f'at most {MOST_ENTRIES}'}")
    return value


def _integer(value: object, name: str, most: int = MOST, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _WrongError(f"{name} is not an integer from {least} to {most}, but {shown(value)}")
    return value


def _count(content: Mapping[str, Any], name: str) -> int:
    return _integer(content.get(name), name)


def _number(value: object, name: str) -> float:
    # An integer of any size is compared without being made a float, which could overflow.
    if type(value) not in (int, float) or not -1e300 <= value <= 1e300:  # type: ignore[operator]
        raise _WrongError(f"{name} is not a finite number, but {shown(value)}")
    return value  # type: ignore[return-value]


def _number_or_none(value: object, name: str) -> float | None:
    return None if value is None else _number(value, name)


# --- tensors --------------------------------------------------------------------------------


def _tensor(value: object, name: str) -> Tensor:
    """A tensor on the CPU whose numbers are all stored: a view of one number can claim any size."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        raise _WrongError(f"{name} is not a tensor")
    if value.device.type != "cpu" or value.is_complex():
        raise _WrongError(f"{name} is not a tensor of real numbers on the CPU")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise _WrongError(f"{name} claims more numbers than are stored")
    return value.detach()


def _tensors(value: object, name: str) -> dict[str, Tensor]:
    given = _mapping(value, name)
    return {key: _tensor(x, f"{name}[{shown(key)}]") for key, x in given.items()}


def _bytes(value: object, name: str) -> Tensor:
    x = _tensor(value, name)
    if x.dtype != torch.uint8 or x.ndim != 1 or x.numel() > _CUDA_BYTES:
        raise _WrongError(f"{name} is not a row of bytes")
    return x.contiguous()


# --- parts of a checkpoint ------------------------------------------------------------------


def _agent_part(content: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    updates = content.get("updates")
    return {
        "frames": _count(content, "frames"),
        "updates": None if updates is None else _integer(updates, "updates"),
        "spec": _spec(_mapping(content.get("spec"), "spec"), image_size),
        "agent": _tensors(content.get("agent"), "agent"),
    }


def _spec(plain: Mapping[str, Any], image_size: int) -> EnvSpec:
    given = _mapping(plain.get("obs"), "spec['obs']")
    if not given:
        raise _WrongError("spec has no observations")
    obs = {name: _observation(name, entry, image_size) for name, entry in given.items()}
    actions = _integer(plain.get("action_dim"), "spec['action_dim']", MOST_NUMBERS, least=1)
    repeat = _integer(plain.get("repeat"), "spec['repeat']", least=1)
    groups = tuple(
        _integer(x, "spec['action_groups']", actions, least=1)
        for x in _list(plain.get("action_groups", []), "spec['action_groups']", None)
    )
    if groups and sum(groups) != actions:
        raise _WrongError(f"spec['action_groups'] is not one of {actions} actions")
    entries_per_action = len(groups) or actions
    low, high = (_bounds(plain.get(key), f"spec[{key!r}]", entries_per_action) for key in _BOUNDS)
    shape = plain.get("action_shape")
    if shape is not None:
        sizes = _list(shape, "spec['action_shape']", None)
        shape = tuple(_integer(x, "spec['action_shape']", MOST_NUMBERS) for x in sizes)
        if math.prod(shape) != entries_per_action:
            raise _WrongError(f"spec['action_shape'] is not one of {actions} actions")
    dtype = plain.get("action_dtype", "float64")
    if dtype not in _ACTION_TYPES:
        raise _WrongError(f"spec['action_dtype'] is {shown(dtype)}")
    entries = [_entry(x) for x in _list(plain.get("entries", []), "spec['entries']", None)]
    names = _names(plain.get("action_names", []), actions)
    return EnvSpec(obs, actions, repeat, low, high, shape, dtype, tuple(entries), groups, names)


def _names(value: object, actions: int) -> tuple[str, ...]:
    """The names of discrete actions (A,), or none."""
    if value in ((), []):
        return ()
    names = _list(value, "spec['action_names']", actions)
    if not all(type(x) is str and len(x) <= _LONGEST_NAME for x in names):
        raise _WrongError("spec['action_names'] are not short texts")
    return tuple(names)


def _entry(value: object) -> Entry:
    """How one entry of the environment's observations is used."""
    name = "an entry of spec['entries']"
    path, use, shape, dtype, counts, starts, high = _list(value, name, len(Entry._fields))
    keys = _list(path, name, None)
    if not all(type(x) is str or (type(x) is int and abs(x) <= MOST) for x in keys):
        raise _WrongError(f"{name} has the path {shown(path)}")
    usable = use in (*IMAGE_AXES, NUMBERS, ONE_HOT) and dtype in _OBSERVATION_TYPES
    if not usable and (use, dtype) != (UNUSED, "str"):
        raise _WrongError(f"{name} is used as {shown(use)} {shown(dtype)}")
    sizes, choices, firsts = (
        tuple(_integer(x, name, most, least) for x in _list(values, name, None))
        for values, most, least in (
            (shape, MOST_NUMBERS, 0),
            (counts, MOST_CLASSES, 1),
            (starts, MOST, -MOST),
        )
    )
    if use in IMAGE_AXES and len(sizes) != len(use):
        raise _WrongError(f"{name} is an image of shape {shown(shape)}")
    if use == ONE_HOT and not len(choices) == len(firsts) == math.prod(sizes):
        raise _WrongError(f"{name} has {len(choices)} choices")
    return Entry(
        tuple(keys), use, sizes, dtype, choices, firsts, _integer(high, name, 255, least=1)
    )


_FLOATS = ("float16", "float32", "float64")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_ACTION_TYPES = (*_FLOATS, *_INTEGERS)
_OBSERVATION_TYPES = (*_ACTION_TYPES, "bool", "longdouble", "float128")


_LONGEST_NAME = 40  # characters of an action's name
_BOUNDS = ("action_low", "action_high")


def _bounds(value: object, name: str, actions: int) -> tuple[float, ...]:
    """Bounds of the actions (A,), which earlier versions did not save."""
    if value is None or value in ((), []):
        return ()
    return tuple(float(_number(x, name)) for x in _list(value, name, actions))


def _observation(name: str, entry: object, image_size: int) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an observation: an image (height, width, 3), or a vector (dim,)."""
    if not OBSERVATION_NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise _WrongError(f"spec has an observation with the name {shown(name)}")
    shape, dtype = _list(entry, f"the observation {name}", 2)
    if dtype == "uint8":
        sides = _list(shape, f"the shape of {name}", 3)
        sides = [_integer(x, f"the shape of {name}", LONGEST_SIDE) for x in sides]
        if sides != [image_size, image_size, 3]:
            raise _WrongError(f"{name} is not an image of {image_size} x {image_size} pixels")
        return (image_size, image_size, 3), "uint8"
    if dtype != "float32":
        raise _WrongError(f"{name} has the type {shown(dtype)}")
    (size,) = _list(shape, f"the shape of {name}", 1)
    return (_integer(size, f"the size of {name}", MOST_NUMBERS, least=1),), "float32"


def _optimizer(value: object) -> dict[int, dict[str, Tensor]]:
    """The state of each weight, by its number. The settings of the optimizer are not read."""
    state = _mapping(value, "optimizer").get("state")
    if not isinstance(state, dict):
        raise _WrongError("optimizer['state'] is not a mapping of numbers to tensors")
    return {
        _integer(index, "a weight's number in optimizer"): _tensors(x, f"optimizer[{index}]")
        for index, x in state.items()
    }


def _ratio(value: object, decisions: int, config: Config) -> dict[str, Any]:
    state, update = _mapping(value, "ratio"), config.train.batch * config.train.length
    previous, rows = state.get("previous"), _number(state.get("rows"), "ratio['rows']")
    if not 0 <= rows <= update:  # the remainder of one update
        raise _WrongError(f"ratio['rows'] is not between 0 and {update}, but {shown(rows)}")
    return {
        "rows": rows,
        "previous": None if previous is None else _integer(previous, "ratio", decisions),
        "widest": _integer(state.get("widest"), "ratio['widest']", decisions),
    }


def _due(value: object) -> dict[str, dict[str, float]]:
    due = _mapping(value, "due")
    if unknown := [name for name in due if name not in SCHEDULES]:
        raise _WrongError(f"due has a schedule {shown(unknown[0])}")
    result = {}
    for name, state in due.items():
        given = _mapping(state, f"due[{name!r}]")
        # Earlier versions did not save the interval.
        keys = [key for key in ("due", "interval") if key == "due" or key in given]
        result[name] = {key: _number(given.get(key), f"due[{name!r}][{key!r}]") for key in keys}
    return result


def _replay(content: Mapping[str, Any]) -> dict[str, int]:
    state = _mapping(content.get("replay"), "replay")
    return {key: _integer(state.get(key), f"replay[{key!r}]") for key in ("cursor", "rows", "envs")}


def _random(state: Mapping[str, Any]) -> dict[str, Any]:
    """The states of the global random generators, each tried on a generator of its own."""
    cuda = state.get("cuda")
    if not isinstance(cuda, list | tuple):
        raise _WrongError("random['cuda'] is not a list")
    torch_state = _bytes(state.get("torch"), "random['torch']")
    cuda_states = [_bytes(x, "random['cuda']") for x in cuda]
    try:
        torch.Generator().set_state(torch_state)
        if cuda_states and torch.cuda.is_available():
            for x in cuda_states:
                torch.Generator("cuda").set_state(x)
        name, keys, position, has_gauss, gauss = _list(state.get("numpy"), "random['numpy']", 5)
        # NumPy reads beyond its state if the position is wrong.
        position = _integer(position, "random['numpy']", _MT19937_NUMBERS)
        has_gauss = _integer(has_gauss, "random['numpy']", 1)
        gauss = float(_number(gauss, "random['numpy']"))
        keys = np.array(_list(keys, "random['numpy']", _MT19937_NUMBERS), dtype=np.uint32)
        numpy = (name, keys, position, has_gauss, gauss)
        np.random.RandomState().set_state(numpy)
        python = _python_random(state.get("python"))
    except _REFUSALS as error:
        raise _WrongError(f"a state of a random generator is not valid ({error})") from error
    numpy_state = [name, keys.tolist(), position, has_gauss, gauss]
    return {"torch": torch_state, "cuda": cuda_states, "numpy": numpy_state, "python": python}


def _python_random(value: object) -> tuple[Any, ...]:
    version, numbers, gauss = _list(value, "random['python']", 3)
    numbers = _list(numbers, "random['python']", _MT19937_NUMBERS + 1)
    numbers = tuple(_integer(x, "random['python']", 2**32 - 1) for x in numbers)
    state = (
        _integer(version, "random['python']"),
        numbers,
        _number_or_none(gauss, "random['python']"),
    )
    random.Random().setstate(state)
    return state


def _sampler(value: object) -> dict[str, Any]:
    """The state of the NumPy generator that draws batches, tried on a generator of its own."""
    state = dict(_mapping(value, "sampler"))
    try:
        np.random.default_rng(0).bit_generator.state = state
    except _REFUSALS as error:
        raise _WrongError(f"sampler is not the state of a random generator ({error})") from error
    return state
