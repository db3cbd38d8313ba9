#!/usr/bin/env python3
"""Train and compare runs that begin from something.

    tools/benchmarks/beginnings.py run FOLDER [NAME ...]
    tools/benchmarks/beginnings.py report FOLDER --out docs/results/beginnings

Does an agent that learns from a replay alone reach the agent that recorded it? Does an agent that
begins with the weights of another run learn sooner than a fresh one? ``run`` trains the runs (or
those of these names) one after the other into FOLDER, a relative path, each in a process of its own
with one thread.
``report`` writes the evaluations as CSV, JSON and a chart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from latentplan.inspection.curves import Curve, draw_curves, read_curve, report_path, write_curves
from latentplan.types import UserError

COMMON = ("obs=state", "size=tiny", "env.workers=false", "train.threads=1", "log.inspect_every=0")
DUMMY = (
    *("task=dummy:pixels", "env.repeat=4", "train.ratio=64", "behavior.horizon=8"),
    *("behavior.discount_horizon=20", "eval.episodes=10", "train.precision=float32"),
)
RECORDER = (*DUMMY, "train.prefill=200", "eval.every=1024", "log.every=512", "steps=6144")
DOT = (*DUMMY, "train.prefill=64", "eval.every=256", "log.every=256", "steps=2048")
CARTPOLE = ("eval.episodes=5", "log.every=2000")
BALANCE = ("task=cartpole_balance", *CARTPOLE, "eval.every=4000", "steps=32000", "seed=0")
SWINGUP = ("task=cartpole_swingup", *CARTPOLE, "eval.every=2000", "steps=10000")
SEEDS = {"offline": (1, 2, 3), "from-recorder": (1, 2, 3), "fresh": (1, 2, 3)}
SEEDS |= {"swingup-from-balance": (1, 2), "swingup-fresh": (1, 2)}
# Title of a panel, and the runs of each label in it.
PANELS = {
    "dummy:pixels from state, offline": {
        "recorder (online)": ("recorder",),
        "offline, from its replay": tuple(f"offline-s{x}" for x in SEEDS["offline"]),
    },
    "dummy:pixels from state": {
        "weights of the recorder": tuple(f"from-recorder-s{x}" for x in SEEDS["fresh"]),
        "fresh weights": tuple(f"fresh-s{x}" for x in SEEDS["fresh"]),
    },
    "cartpole_swingup from state": {
        "weights of cartpole_balance": tuple(
            f"swingup-from-balance-s{x}" for x in SEEDS["swingup-fresh"]
        ),
        "fresh weights": tuple(f"swingup-fresh-s{x}" for x in SEEDS["swingup-fresh"]),
    },
}


def settings(folder: Path) -> dict[str, list[str]]:
    """The ``key=value`` items of every run, by its name, in the order of training."""
    groups = {
        "offline": (*RECORDER, f"train.offline={folder}/recorder/replay"),
        "from-recorder": (*DOT, f"train.init_from={folder}/recorder"),
        "fresh": DOT,
        "swingup-from-balance": (*SWINGUP, f"train.init_from={folder}/balance-s0"),
        "swingup-fresh": SWINGUP,
    }
    runs = {"recorder": (*RECORDER, "seed=0"), "balance-s0": BALANCE}
    for group, items in groups.items():
        runs |= {f"{group}-s{seed}": (*items, f"seed={seed}") for seed in SEEDS[group]}
    return {name: [*COMMON, *x, f"run_dir={folder}/{name}"] for name, x in runs.items()}


def report(folder: Path, out: Path) -> None:
    """Write ``out``.csv, ``out``.json and ``out``.png.

    Raises:
        UserError: a run is missing, or a file cannot be written.
    """
    curves = {name: read_curve(folder / name) for name in settings(folder)}
    for curve in curves.values():
        for session in curve.description["sessions"]:
            session["command"][0] = "latentplan"  # not the path of this machine
    write_curves(list(curves.values()), out)
    panels: dict[str, dict[str, list[Curve]]] = {
        title: {label: [curves[x] for x in names] for label, names in groups.items()}
        for title, groups in PANELS.items()
    }
    draw_curves(panels, report_path(out, ".png"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("docs/results/beginnings"))
    args = parser.parse_args()
    try:
        if args.action == "report":
            report(args.folder, args.out)
            return 0
        runs = settings(args.folder)
        for name in args.names or runs:
            if name not in runs:
                raise UserError(f"There is no run {name}; there are: {', '.join(runs)}.")
            subprocess.run([sys.executable, "-m", "latentplan", "train", *runs[name]], check=True)
    except UserError as error:
        print(f"beginnings: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
