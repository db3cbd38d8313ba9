#!/usr/bin/env python3
"""Write the evaluation curves of run folders to one CSV, one JSON and one PNG file.

    tools/results.py RUN [RUN ...] --out docs/results/NAME [--goal 700]

NAME.csv has a row per evaluation. NAME.json has a description per run (command, commit, packages,
machine). NAME.png shows returns against frames, with a panel per task and a color per seed. For a
single task it also shows returns against wall clock. All three files have all runs. For a whole
study, use ``latentplan study report``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from latentplan.inspection.curves import Curve, draw_curves, read_curve, report_path, write_curves
from latentplan.types import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="docs/results/NAME")
    parser.add_argument("--goal", type=float, help="draw a dashed line at this return")
    args = parser.parse_args()
    try:
        curves = [read_curve(folder) for folder in args.runs]
        write_curves(curves, args.out)
        panels: dict[str, dict[str, list[Curve]]] = {}
        for curve in curves:
            task, seed = (
                curve.description["task"].removeprefix("dmc:"),
                f"seed {curve.description['seed']}",
            )
            panels.setdefault(task, {}).setdefault(seed, []).append(curve)
        chart = report_path(args.out, ".png")
        draw_curves(panels, chart, goal=args.goal, minutes=len(panels) == 1)
    except UserError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
