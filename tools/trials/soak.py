"""A long run: memory, threads, handles and files stay as they are."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from latentplan.inspection.plots import pyplot
from trials import small_run
from trials.report import Result

SETTINGS = (
    *("size=tiny", "task=dmc:cartpole_swingup", "steps=1000000000", "env.repeat=2"),
    *("env.num_envs=2", "env.workers=true", "train.ratio=4", "replay.capacity=5000"),
    *("train.threads=1", "log.every=1000", "log.checkpoint_seconds=20", "eval.every=4000"),
    *("eval.episodes=1", "log.inspect_every=4000"),
)
# A run of half a minute, of which the tests want to know that it ends and leaves nothing.
SMALL_SETTINGS = (
    *small_run.SETTINGS,
    *("env.workers=true", "env.num_envs=2", "steps=1000000000", "log.checkpoint_seconds=2"),
    *("eval.every=256", "log.inspect_every=512"),
)
SECONDS = 30.0  # between samples
SAMPLES_MIN = 8  # of a verdict
GROWING = ("replay", "videos", "metrics.jsonl", "events")  # of a run folder, by design


class Limit(NamedTuple):
    """How much a value may grow from the end of the first quarter to the end of the run."""

    share: float  # of its median
    least: float  # at least this much, in its unit


# Evaluations and films come and go, so that single samples differ by more than these.
LIMITS = {
    "memory_mib": Limit(0.05, 20.0),
    "handles": Limit(0.05, 2.0),
    "threads": Limit(0.05, 2.0),
    "shared_files": Limit(0.05, 1.0),
    "temporary_files": Limit(0.05, 1.0),
    "folder_mib": Limit(0.05, 1.0),
}


def run(
    folder: Path,
    minutes: float,
    seed: int,
    out: Path | None = None,
    items: Sequence[str] = (),
    small: bool = False,
) -> Result:
    """Train for ``minutes``, and watch the processes of the run.

    Args:
        folder: a folder for the run and for its temporary files.
        minutes: of training.
        seed: of training.
        out: the samples are written beside this file, as CSV and PNG.
        items: other settings.
        small: train a tiny agent instead of one of the size ``tiny``.
    """
    settings = [*(SMALL_SETTINGS if small else SETTINGS), *items]
    samples, wrong = _train(folder, minutes, [*settings, f"seed={seed}"])
    growth = (
        {name: _growth(samples, name) for name in LIMITS} if len(samples) >= SAMPLES_MIN else {}
    )
    if not growth:
        wrong.append(f"only {len(samples)} samples: the run was too short for a verdict")
    wrong += [
        f"{name} grew by {grown:.1f} around {median:.1f}"
        for name, (grown, median) in growth.items()
        if grown > max(LIMITS[name].least, LIMITS[name].share * median)
    ]
    if out is not None and samples:
        _write(samples, out.with_suffix(".csv"), out.with_suffix(".png"))
    return Result(
        fault="a long run with evaluations, films and checkpoints",
        tried=len(samples),
        outcomes={
            name: f"{grown:+.1f} around {median:.1f}" for name, (grown, median) in growth.items()
        },
        wrong=wrong,
        summary=f"{minutes:g} minutes, {len(samples)} samples: "
        + ("; ".join(wrong) or "memory, handles, threads and files are flat"),
        details={"minutes": minutes, "settings": settings},
    )


def _train(
    folder: Path, minutes: float, settings: Sequence[str]
) -> tuple[list[dict[str, float]], list[str]]:
    """Train, and return the samples and what is wrong at the end."""
    run_folder, temporary, log = folder / "run", folder / "tmp", folder / "log.txt"
    temporary.mkdir()
    command = [sys.executable, "-m", "latentplan", "train", *settings]
    command += [f"train.minutes={minutes}", f"run_dir={run_folder}"]
    # The compiler keeps what it has compiled, which is no leak.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    environment = {**os.environ, **cache, "TMPDIR": str(temporary)}
    interval = min(SECONDS, minutes * 60 / (2 * SAMPLES_MIN))
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        samples = _watch(process, run_folder, temporary, interval)
    wrong = []
    if process.returncode:
        wrong.append(f"exit code {process.returncode}: {log.read_text(errors='replace')[-500:]}")
    if left := [path.name for path in temporary.iterdir()]:
        wrong.append(f"temporary files are left at the end: {', '.join(left[:5])}")
    return samples, wrong


def _watch(
    process: subprocess.Popen[bytes], run_folder: Path, temporary: Path, interval: float
) -> list[dict[str, float]]:
    """Samples of a process that was started just now.

    The first sample is taken when the run has written its first row of metrics.
    """
    begun, samples = time.monotonic(), []
    shared = _count(Path("/dev/shm"))
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(interval)
        if process.poll() is None and (run_folder / "metrics.jsonl").exists():
            sample = _sample(psutil.Process(process.pid))
            sample["shared_files"] = _count(Path("/dev/shm")) - shared
            sample["temporary_files"] = _count(temporary)
            sample["folder_mib"] = _folder_mib(run_folder)
            samples.append({"seconds": time.monotonic() - begun, **sample})
    return samples


def _sample(process: psutil.Process) -> dict[str, float]:
    """Memory, handles and threads of a process and its children, which come and go."""
    sums = {"memory_mib": 0.0, "handles": 0.0, "threads": 0.0}
    with suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                memory = one.memory_info()
                # The replay is mapped, and a mapped page counts as resident but not as used.
                sums["memory_mib"] += (memory.rss - memory.shared) / 2**20
                sums["handles"] += one.num_fds()
                sums["threads"] += one.num_threads()
    return sums


def _count(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*")) if folder.is_dir() else 0


def _folder_mib(run_folder: Path) -> float:
    """The size of a run folder without the replay, and without what grows by design."""
    total = 0
    for path in run_folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and not path.relative_to(run_folder).parts[0].startswith(GROWING):
                total += path.stat().st_size
    return total / 2**20


def _growth(samples: list[dict[str, float]], name: str) -> tuple[float, float]:
    """The growth after the first quarter, by a fitted line, and the median."""
    later = samples[len(samples) // 4 :]
    x, y = (np.array([row[key] for row in later]) for key in ("seconds", name))
    slope = float(np.polyfit(x, y, 1)[0])
    return slope * float(x[-1] - x[0]), statistics.median(y.tolist())


def _write(samples: list[dict[str, float]], table: Path, chart: Path) -> None:
    """Write the samples as CSV, and draw a panel for each value."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, samples[0].keys())
        writer.writeheader()
        writer.writerows({key: f"{x:.2f}" for key, x in row.items()} for row in samples)
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for axis, name in zip(axes.flat, LIMITS, strict=True):
        axis.plot([row["seconds"] / 60 for row in samples], [row[name] for row in samples])
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("minutes")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(chart, dpi=90)
    plt.close(figure)
