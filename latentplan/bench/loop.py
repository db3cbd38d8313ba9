"""The speed of the training loop, by training for a short time."""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentplan.config.schema import Config
from latentplan.training.session import train
from latentplan.types import UserError

PREFILL = 200  # decisions; more if a training window is longer
LOG_EVERY = 20  # decisions
COMPILING = 90.0  # more seconds for the first updates, where functions are compiled


def loop_cost(config: Config, seconds: float) -> dict[str, Any]:
    """Train in a temporary folder, without evaluations and films.

    Returns:
        Frames and updates per second (medians over the lines of the log, without the first line
        with updates), fractions of the wall clock by part, seconds of sampling the replay, memory.

    Raises:
        UserError: the time was too short for an update.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        run = Path(folder) / "run"
        prefill = max(PREFILL, config.train.length + 1)
        longer = COMPILING if config.train.compile != "off" else 0.0
        train(
            replace(
                config,
                run_dir=str(run),
                steps=2**40,
                train=replace(config.train, prefill=prefill, minutes=(seconds + longer) / 60),
                eval=replace(config.eval, every=0, episodes=1, video=False),
                log=replace(config.log, every=LOG_EVERY * config.env.repeat, inspect_every=0),
                replay=replace(config.replay, capacity=min(config.replay.capacity, 20_000)),
            )
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines[:-1] if line["fps/updates"] > 0][1:]
    if not lines:
        raise UserError(f"{seconds:g} seconds are too short for the loop: it made no update.")
    middle = lambda name: statistics.median(line.get(name, 0.0) for line in lines)  # noqa: E731
    names = [name for name in lines[-1] if name.startswith("fps/share_")]
    fractions = {name.removeprefix("fps/share_"): middle(name) for name in names}
    updates = middle("fps/updates")
    return {
        "frames_per_second": middle("fps/env"),
        "updates_per_second": updates,
        "shares": fractions,
        "replay_seconds": fractions.get("replay", 0.0) / updates,
        "rss_gib": lines[-1]["memory/rss_gib"],
    }


def describe_loop(loop: Mapping[str, Any]) -> str:
    """One line of text."""
    parts = sorted(loop["shares"].items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {fraction:.0%}" for name, fraction in parts if fraction >= 0.005)
    return (
        f"whole loop: {loop['frames_per_second']:.0f} frames/s, {loop['updates_per_second']:.2f} "
        f"updates/s ({text}); a batch from the replay {1000 * loop['replay_seconds']:.1f} ms; "
        f"{loop['rss_gib']:.2f} GiB"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log of training."""
    log = logging.getLogger("latentplan")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
