#!/usr/bin/env python3
"""Train a tiny agent for a long time, and check that memory and files do not grow.

    tools/soak.py RUN [key=value ...] [--out docs/results/soak.csv]

It trains for 200,000 frames from pixels into RUN, with evaluations and films. The replay overwrites
its oldest rows many times. Then it prints the use of memory and disk. The exit code is 1 if the
last fifth of the run used 5 % more memory than the second fifth, or if the final files, without
curves and films, are 5 % larger than all files were in the second fifth. RUN may be an existing
run.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

from latentplan.inspection.curves import read_metrics
from latentplan.types import UserError

SETTINGS = (
    *("size=tiny", "task=dmc:cartpole_swingup", "steps=200000", "env.repeat=2", "env.num_envs=2"),
    *("train.ratio=4", "replay.capacity=5000", "eval.every=20000", "log.inspect_every=20000"),
)
WATCHED = ("memory/rss_gib", "memory/shared_gib", "memory/disk_gib")
ALLOWED = 1.05
FIFTHS = 5
CURVES = ("events*", "videos/*", "metrics.jsonl")  # these files grow with the length of a run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("items", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, metavar="CSV")
    args = parser.parse_args()
    command = [sys.executable, "-m", "latentplan", "train", *SETTINGS]
    code = subprocess.call([*command, *args.items, f"run_dir={args.run}"])
    if code:
        return code
    try:
        rows = [row for row in read_metrics(args.run) if all(key in row for key in WATCHED)]
    except UserError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    if len(rows) < FIFTHS:
        print(f"soak: only {len(rows)} rows of metrics: the run was too short.", file=sys.stderr)
        return 2
    if args.out:
        with open(args.out, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["frame", *WATCHED])
            table.writerows([row["step"], *(f"{row[key]:.4f}" for key in WATCHED)] for row in rows)
    early, late = (medians(rows, fifth) for fifth in (1, 4))
    for key in WATCHED:
        print(f"{key:18} second fifth {early[key]:.3f}, last fifth {late[key]:.3f} GiB")
    grown = [k for k in WATCHED[:1] if late[k] > ALLOWED * early[k]]
    curves = sum(size(args.run, pattern) for pattern in CURVES)
    others = size(args.run, "**/*") - curves
    print(f"{'at the end':18} curves and films {curves:.3f}, other files {others:.3f} GiB")
    if others > ALLOWED * early["memory/disk_gib"]:
        grown.append("files")
    print(f"grown: {', '.join(grown) or 'nothing'}")
    return 1 if grown else 0


def size(run: Path, pattern: str) -> float:
    """The size in GiB of the files that match a pattern."""
    return sum(path.stat().st_size for path in run.glob(pattern) if path.is_file()) / 2**30


def medians(rows: list[dict[str, float]], fifth: int) -> dict[str, float]:
    """The medians over a fifth of the run, counted from 0."""
    part = rows[fifth * len(rows) // FIFTHS : (fifth + 1) * len(rows) // FIFTHS]
    return {key: statistics.median(row[key] for row in part) for key in WATCHED}


if __name__ == "__main__":
    sys.exit(main())
