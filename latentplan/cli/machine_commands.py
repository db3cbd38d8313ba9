"""Commands about many runs, or about the machine. Modules are imported when one runs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from latentplan.cli.arguments import Commands
from latentplan.types import UserError


def add(commands: Commands) -> None:
    """All of them; each sets ``run``: parsed arguments -> exit code."""
    for add_one in (_add_study, _add_tensorboard, _add_doctor, _add_bench):
        add_one(commands)


def _add_study(commands: Commands) -> None:
    study = commands.add_parser("study", help="tasks x ablations x seeds, from one file")
    study.add_argument("action", choices=("run", "status", "report"))
    study.add_argument("file", type=Path, metavar="FILE")
    study.add_argument("--out", type=Path, help="of the report, without a suffix: FOLDER/NAME")
    study.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="NAME",
        help="an earlier report, for runs whose folders are not here; may be repeated",
    )
    study.set_defaults(run=_study)


def _study(args: argparse.Namespace) -> int:
    from latentplan.study import report, runner

    if args.action != "report" and (args.out or args.also):
        raise UserError("--out and --also are of study report.")
    if args.action == "run":
        return runner.run(args.file)
    if args.action == "report":
        out = args.out or Path("runs") / args.file.stem
        print(report.report(args.file, out, args.also))
        return 0
    print(runner.show(args.file))
    return 0


def _add_tensorboard(commands: Commands) -> None:
    board = commands.add_parser("tensorboard", help="show runs in TensorBoard")
    board.add_argument("run_folder", metavar="RUN", nargs="+", help="run folders, or their parent")
    board.add_argument("--host", default="localhost", help="0.0.0.0 inside a container")
    board.add_argument("--port", type=int, default=6006)
    board.set_defaults(run=_tensorboard)


def _tensorboard(args: argparse.Namespace) -> int:
    folders = [Path(name) for name in args.run_folder]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder.")
    spec = ",".join(f"{name}:{folder}" for name, folder in _short_names(folders).items())
    where = ["--logdir", str(folders[0])] if len(folders) == 1 else ["--logdir_spec", spec]
    address = ["--host", args.host, "--port", str(args.port)]
    return subprocess.call([sys.executable, "-m", "tensorboard.main", *where, *address])


def _short_names(folders: list[Path]) -> dict[str, Path]:
    """Each folder by the end of its path, of as many parts as tell all of them apart."""
    paths = list(dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders))
    count = 1
    while len({path.parts[-count:] for path in paths}) < len(paths):
        count += 1
    # TensorBoard takes a name that begins with a slash for a path.
    return {"/".join(path.parts[-count:]).lstrip("/"): path for path in paths}


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser("doctor", help="check rendering, packages and hardware")
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from latentplan.cli.doctor import diagnose

    report, healthy = diagnose()
    print(report)
    return 0 if healthy else 2


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser("bench", help="time one update, part by part, and the environment")
    bench.add_argument("items", nargs="*", metavar="key=value", help="overrides")
    widths = bench.add_mutually_exclusive_group()
    widths.add_argument("--peer", choices=("small", "large"), help="default: both peers' widths")
    widths.add_argument("--size", help="a preset of configs/size instead, for example cpu")
    bench.add_argument("--planning", action="store_true", help="also updates and actions with it")
    bench.add_argument("--repeats", type=int, default=7, help="interleaved repetitions")
    bench.add_argument("--seconds", type=float, default=5.0, help="of stepping the environment")
    bench.add_argument("--loop", type=float, default=0.0, metavar="SECONDS", help="also train")
    updates = bench.add_mutually_exclusive_group()
    updates.add_argument(
        "--ablations", nargs="+", metavar="NAME", help="instead: their updates, against the first"
    )
    updates.add_argument(
        "--growth", metavar="FILE", help="instead: time against batch, horizon, ...; a PNG"
    )
    bench.add_argument("--json", metavar="FILE", help="also write the results there")
    bench.add_argument("--against", metavar="FILE", help="compare with an earlier --json file")
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from latentplan.bench.measure import PEERS, bench
    from latentplan.bench.report import compare, describe, read_json, write_json

    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {args.repeats}.")
    if args.growth or args.ablations:
        return _bench_updates(args)
    earlier = read_json(args.against) if args.against else None
    results = bench(
        [args.peer] if args.peer else tuple(PEERS),
        args.size,
        args.items,
        repeats=args.repeats,
        env_seconds=args.seconds,
        planning=args.planning,
        loop_seconds=args.loop,
    )
    print(describe(results))
    if earlier is not None:
        print(compare(results, earlier))
    if args.json:
        write_json(args.json, results)
    return 0


def _bench_updates(args: argparse.Namespace) -> int:
    """Nothing but updates, of several configurations."""
    from latentplan.bench.ablations import ablation_cost, describe_ablations
    from latentplan.bench.growth import describe_growth, draw_growth, growth

    for name in ("json", "against", "loop", "planning", "peer"):
        if getattr(args, name):
            raise UserError(f"--{name} does not go with --growth or --ablations.")
    names = args.ablations or []  # keys behind them are read as names, too
    args.ablations = [name for name in names if "=" not in name]
    keys = [name for name in names if "=" in name]
    overrides = [*([f"size={args.size}"] if args.size else []), *args.items, *keys]
    if args.growth:
        found = growth(overrides, args.repeats)
        print(describe_growth(found))
        draw_growth(found, Path(args.growth))
    else:
        print(describe_ablations(ablation_cost(args.ablations, overrides, args.repeats)))
    return 0
