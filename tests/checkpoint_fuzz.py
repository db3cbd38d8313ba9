"""Checkpoints with wrong content: mutations of a good one, and what must hold for each.

The quick form is ``tests/runs/test_fuzzed_checkpoints.py``. A longer run is::

    failures = run_cases(run, scratch, seed=0, count=2000)
"""

from __future__ import annotations

import copy
import random
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from latentplan.runs import checkpoint, run_folder
from latentplan.runs.resuming import config_to_resume
from latentplan.runs.source import RunSource
from latentplan.training.loop import Trainer
from latentplan.training.start import resolve
from latentplan.types import UserError

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**63, 2**70, -(2**70), 10**400),
    *(0.5, -1.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "0", "best", "../x", "/etc/passwd", "a/b", "a\0b", "x" * 10_000),
    *([], {}, (), [[[[]]]], [1, "a", None], {"a": 1}, {1: 2}, {"../x": [[3], "float32"]}),
    [10**9],
    {"vector": [[10**9], "float32"]},
    {"image": [[10**5, 10**5, 3], "uint8"]},
    torch.zeros(()),
    torch.zeros(3, dtype=torch.int64),
    torch.full((2, 2), float("nan")),
    torch.zeros(1).expand(10**9),
    torch.zeros(2, dtype=torch.complex64),
    torch.empty(0),
)
NAMES = ("../x", "/tmp/x", "a.b", "keys", "", "x" * 300, "a\0b", "\ud800", 3, None)


class Failure(NamedTuple):
    """A case in which something else than a UserError was raised."""

    case: int
    change: str  # what was changed
    use: str
    error: str  # traceback


def run_cases(run: Path, scratch: Path, *, seed: int, count: int) -> list[Failure]:
    """Mutate the checkpoint of a run, and load and resume the run with each mutation.

    Args:
        run: a finished run folder, which is not changed.
        scratch: a folder, in which one copy of the run is made.
        seed, count: case k of a seed is the same for every count.

    Returns:
        The cases that failed.
    """
    folder = scratch / "fuzzed"
    shutil.copytree(run, folder)
    path = run_folder.checkpoint_path(folder)
    good = checkpoint.load(path)
    failures = []
    for case in range(count):
        rng = random.Random(f"{seed} {case}")
        bad, change = mutated(good, rng)
        checkpoint.save(path, bad, keep_former=False)
        for use in (_load, _load_agent, _open_replay, _resume):
            try:
                use(folder)
            except UserError as error:
                assert str(error), change
            except Exception:
                failures.append(Failure(case, change, use.__name__, traceback.format_exc()))
    shutil.rmtree(folder)
    return failures


def mutated(payload: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """A copy of a checkpoint's content with one to three changes, and their description."""
    result = copy.deepcopy(payload)
    changes = [_change(result, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return result, "; ".join(changes)


def _change(tree: dict[Any, Any], rng: random.Random) -> str:
    """Change one value somewhere in a tree, in place."""
    parent, key, where = _place(tree, rng)
    kind = rng.choice(("value", "value", "value", "delete", "rename", "tensor", "number"))
    old = parent[key]
    if kind == "delete" and not isinstance(parent, tuple):
        del parent[key]
        return f"{where} deleted"
    if kind == "rename" and isinstance(parent, dict):
        name = rng.choice(NAMES)
        parent[name] = parent.pop(key)
        return f"{where} renamed {name!r}"
    if kind == "tensor" and isinstance(old, torch.Tensor):
        new = rng.choice(_tensors(old))
    elif kind == "number" and type(old) in (int, float):
        new = rng.choice((-old, old * 10**9, old + 1, float(old), str(old), [old]))
    else:
        new = rng.choice(VALUES)
    parent[key] = new
    return f"{where} = {repr(new)[:60]}"


def _tensors(x: torch.Tensor) -> tuple[Any, ...]:
    """Tensors that differ from ``x`` in shape, type or content."""
    flat = x.reshape(-1)
    return (
        flat.clone() if x.ndim != 1 else x[None].clone(),
        torch.full(x.shape, 255).to(x.dtype),
        torch.full(x.shape, float("nan")),
        x.to(torch.int64),
        x.double(),
        x.tolist(),
        torch.cat([flat, flat]),
        flat[:-1].clone(),
        x.to_sparse() if x.ndim else x,
    )


def _place(tree: Any, rng: random.Random) -> tuple[Any, Any, str]:
    """A value of a tree: what contains it, its key, and its path. Short branches are as likely."""
    where = ""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        where += f"[{key!r}]"
        child = tree[key]
        if isinstance(child, tuple):
            child = tree[key] = list(child)
        deeper = isinstance(child, dict | list) and len(child) > 0
        if not deeper or rng.random() < 0.2:
            return tree, key, where
        tree = child


# --- uses -----------------------------------------------------------------------------------


def _load(folder: Path) -> None:
    run_folder.load(folder)


def _load_agent(folder: Path) -> None:
    run_folder.load_agent(folder)


def _open_replay(folder: Path) -> None:
    with run_folder.open_replay(folder):
        pass


def _resume(folder: Path) -> None:
    """Restore everything that a session restores, and write nothing."""
    config = config_to_resume(RunSource(folder))
    start = resolve(replace(config, log=replace(config.log, inspect_every=0)))
    trainer = Trainer(start)
    trainer.close()
