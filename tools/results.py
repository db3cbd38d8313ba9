#!/usr/bin/env python3
"""Gather evaluation curves of run folders into one CSV, one JSON and one picture.

    tools/results.py RUN [RUN ...] --out docs/results/NAME [--goal 700]

NAME.csv has a row per evaluation, NAME.json what the runs were (command, commit, packages,
machine), NAME.png returns against frames, a panel per task, a color per seed; of one task also
against wall clock. Every run named is in all three: none is left out. For a whole study there is
``latentplan study report``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from latentplan.inspection.curves import Curve, draw_curves, file_of, read_curve, write_curves
from latentplan.types import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="docs/results/NAME")
    parser.add_argument("--goal", type=float, help="a dashed line at this return")
    args = parser.parse_args()
    try:
        curves = [read_curve(folder) for folder in args.runs]
        write_curves(curves, args.out)
        panels: dict[str, dict[str, list[Curve]]] = {}
        for curve in curves:
            task, seed = curve.what["task"].removeprefix("dmc:"), f"seed {curve.what['seed']}"
            panels.setdefault(task, {}).setdefault(seed, []).append(curve)
        picture = file_of(args.out, ".png")
        draw_curves(panels, picture, goal=args.goal, minutes=len(panels) == 1)
    except UserError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
