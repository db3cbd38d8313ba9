"""Checkpoints: plain values and tensors in one file, which is replaced completely or not at all."""

from __future__ import annotations

import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentplan.runtime import disk
from latentplan.types import UserError

FORMAT = "latentplan-checkpoint-1"
_PLAIN = (int, float, bool, str, bytes, type(None))


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` to ``path``. ``path`` never holds an incomplete checkpoint.

    The payload may contain dicts, lists, tuples, numbers, strings, None and tensors. These can be
    read back without running code.

    Raises:
        TypeError: the payload contains another type, which :func:`load` could not read.
        UserError: the disk is full or the folder cannot be written. An older checkpoint stays.
    """
    _check_types(payload, "payload")
    path = Path(path)
    try:
        with disk.replacing(path) as file:
            torch.save({"format": FORMAT, "payload": payload}, file)
    except (OSError, RuntimeError) as error:
        # The zip writer of torch wraps the error of a failed write in a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"The checkpoint {path} could not be written ({cause.strerror}); "
            + ("the previous one is intact." if path.exists() else "there is none yet.")
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a payload that :func:`save` wrote. Its tensors are on the CPU.

    No arbitrary objects are unpickled, so a foreign file cannot run code.

    Raises:
        UserError: there is no such file, or it is not a complete checkpoint of this program.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except PermissionError as error:
        raise UserError(f"There is no permission to read the checkpoint {path}.") from error
    # torch raises many types of errors for a damaged file, depending on where its parser fails.
    except (
        *(OSError, RuntimeError, EOFError, pickle.UnpicklingError),
        *(LookupError, ValueError, TypeError, AttributeError, AssertionError),
    ) as error:
        raise UserError(f"The file {path} is damaged or is not a checkpoint.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of latentplan.")
    return content["payload"]


def random_state() -> dict[str, Any]:
    """The states of all global random generators: torch (CPU and CUDA), NumPy, Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the states that :func:`random_state` returned, for CUDA devices that still exist."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])


def generator_state(rng: np.random.Generator) -> dict[str, Any]:
    """The state of a NumPy generator with the default bit generator, as plain integers."""
    return dict(rng.bit_generator.state)


def set_generator_state(rng: np.random.Generator, state: dict[str, Any]) -> None:
    """Set a state that :func:`generator_state` returned."""
    rng.bit_generator.state = state


def _check_types(value: Any, where: str) -> None:
    """Raise a TypeError that says where ``value`` contains a type that cannot be loaded."""
    # Exact types are compared: a NumPy scalar is a subclass of float but is refused on loading.
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in _PLAIN:
                raise TypeError(f"{where} has a key of {type(key)}, which a checkpoint cannot hold")
            _check_types(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_types(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value)}, which a checkpoint cannot hold")
