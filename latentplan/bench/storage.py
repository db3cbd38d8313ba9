"""The time of checkpoints and of the replay, and how much of it the checks of their bytes take.

Every step runs as in training, and once more without its checks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.bench.parts import Part, random_rows, summary, time_parts
from latentplan.data.replay import Replay
from latentplan.runs import checkpoint
from latentplan.runtime import disk
from latentplan.types import EnvSpec

ROWS = 2000  # of the replay, or the length of a window if that is more
NEW_ROWS = 500  # that a flush writes


def storage_cost(agent: Agent, spec: EnvSpec, repeats: int) -> dict[str, dict[str, Any]]:
    """Time the writing and reading of a run folder, with files in the page cache.

    Args:
        agent: its weights are saved and read.
        spec: of the rows of the replay.
        repeats: interleaved repetitions of every step.

    Returns:
        By step: ``checked`` and ``plain``, the seconds with and without checks (median, minimum and
        maximum), and ``ratio``, that of the medians.
    """
    parts: dict[str, Part] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for kind, way in {"checked": CHECKED, "plain": PLAIN}.items():
            path = Path(folder) / kind
            named = steps(path, agent, spec, way, stack)
            parts |= {f"{name}, {kind}": part for name, part in named.items()}
        times = time_parts(parts, repeats, torch.device("cpu"))
    seconds = {name: summary(x) for name, x in times.items()}
    pairs = {name: (seconds[f"{name}, checked"], seconds[f"{name}, plain"]) for name in named}
    return {
        name: {"checked": a, "plain": b, "ratio": a["median"] / b["median"]}
        for name, (a, b) in pairs.items()
    }


def describe_storage(cost: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of text."""
    lines = [f"{'storage, ms':28}{'checked':>10}{'plain':>10}{'ratio':>8}"]
    for name, row in cost.items():
        times = "".join(f"{1000 * row[kind]['median']:10.2f}" for kind in ("checked", "plain"))
        lines.append(f"{name:28}{times}{row['ratio']:8.2f}")
    return lines


# --- the steps ------------------------------------------------------------------------------


def steps(folder: Path, agent: Agent, spec: EnvSpec, way: Way, stack: ExitStack) -> dict[str, Part]:
    """The steps by name. ``stack`` closes the files that they use in ``folder``."""
    checkpoints = _checkpoint_steps(folder / "checkpoint.pt", agent, way)
    return checkpoints | _replay_steps(folder, agent, spec, way, stack)


def _nothing() -> None:
    """The preparation of a step that needs none."""


def _checkpoint_steps(path: Path, agent: Agent, way: Way) -> dict[str, Part]:
    payload = {"agent": agent.state_dict()}
    return {
        "save a checkpoint": Part(lambda: way.save(path, payload), _nothing),
        "read a checkpoint": Part(lambda: way.load(path), _nothing),
    }


def _replay_steps(
    folder: Path, agent: Agent, spec: EnvSpec, way: Way, stack: ExitStack
) -> dict[str, Part]:
    train, rng = agent.config.train, np.random.default_rng(0)
    rows = max(ROWS, train.length)
    row = random_rows(spec, 1, 1, torch.device("cpu"))[0].map(lambda x: x[0].numpy())

    def filled(name: str) -> Replay:
        replay = way.replay(folder / name, spec, capacity=rows, envs=1)
        _add(replay, row, rows)
        return replay

    with closing(filled("stored")) as stored:
        state = stored.state_dict()
    replay = stack.enter_context(closing(filled("written")))

    def open_stored() -> None:
        with closing(way.replay(folder / "stored", spec, capacity=rows, envs=1)) as opened:
            opened.load_state_dict(state)

    return {
        f"write {NEW_ROWS} rows": Part(replay.flush, lambda: _add(replay, row, NEW_ROWS)),
        f"open a replay of {rows} rows": Part(open_stored, _nothing),
        "draw a batch": Part(lambda: replay.sample(train.batch, train.length, rng), _nothing),
    }


def _add(replay: Replay, row: Any, count: int) -> None:
    for _ in range(count):
        replay.add(row, np.zeros(1, np.int64))


# --- with checks and without ----------------------------------------------------------------


class Way(NamedTuple):
    """With checks or without: how a checkpoint is saved and read, and the class of the replay."""

    save: Callable[[Path, dict[str, Any]], None]
    load: Callable[[Path], Any]
    replay: type[Replay]


class _PlainReplay(Replay):
    """A replay whose rows get no checksums, so that none is compared."""

    def _sums(
        self, begin: int, end: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        return iter(())


def _save_plain(path: Path, payload: dict[str, Any]) -> None:
    former = checkpoint.former_path(path) if path.exists() else None
    with disk.replacing(path, former) as file:
        torch.save(payload, file)


def _load_plain(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


CHECKED = Way(checkpoint.save, checkpoint.load, Replay)
PLAIN = Way(_save_plain, _load_plain, _PlainReplay)
