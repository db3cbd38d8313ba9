"""Commands about many runs or about the machine. They import modules when they run."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from latentplan.cli.arguments import Commands, expanded, path
from latentplan.types import UserError


def add(commands: Commands) -> None:
    """Add the commands. Each sets ``run``, a function from parsed arguments to the exit code."""
    for add_one in (
        _add_study,
        _add_plot,
        _add_scores,
        _add_tensorboard,
        _add_list,
        _add_doctor,
        _add_bench,
    ):
        add_one(commands)


def _add_study(commands: Commands) -> None:
    study = commands.add_parser(
        "study", help="run tasks x ablations x seeds of one file, or report on them"
    )
    study.add_argument(
        "action",
        choices=("run", "status", "report"),
        help="run the unfinished runs; print their progress; write tables and curves",
    )
    study.add_argument("file", type=path, metavar="FILE", help="a study file (YAML)")
    study.add_argument(
        "--out",
        type=path,
        metavar="FOLDER/NAME",
        help="path of the report without a suffix; default: runs/<name of the study>",
    )
    study.add_argument(
        "--also",
        type=path,
        action="append",
        default=[],
        metavar="NAME",
        help="path of an earlier report, for runs whose folders are missing; may be repeated",
    )
    study.add_argument(
        "--executor",
        choices=("local", "ray", "slurm"),
        default="local",
        help="where `study run` trains: processes of this machine (default), a Ray cluster, Slurm",
    )
    study.add_argument(
        "--address",
        default="",
        metavar="HOST:PORT",
        help="address of a Ray cluster; default: a cluster on this machine alone, for this command",
    )
    study.add_argument(
        "--parallel",
        type=int,
        default=0,
        metavar="N",
        help="number of runs at a time; default: that of the file",
    )
    study.set_defaults(run=_study)


def _study(args: argparse.Namespace) -> int:
    from latentplan.study import report, runner

    if args.action != "report" and (args.out or args.also):
        raise UserError("--out and --also work only with `study report`.")
    if args.action == "run":
        return runner.run(args.file, args.executor, args.address, args.parallel)
    if args.action == "report":
        out = args.out or Path("runs") / args.file.stem
        print(report.report(args.file, out, args.also))
        return 0
    print(runner.show(args.file))
    return 0


def _add_plot(commands: Commands) -> None:
    plot = commands.add_parser(
        "plot", help="draw learning curves of runs: a panel per task, a mean and a band over seeds"
    )
    _add_run_folders(plot)
    plot.add_argument(
        "--out",
        type=path,
        default=Path("curves.png"),
        metavar="FILE",
        help="the image, for example .png, .pdf or .svg; default: curves.png",
    )
    plot.add_argument(
        "--metric",
        default="eval",
        metavar="NAME",
        help="eval (default), sample, planner or train: returns of evaluations of the policy's "
        "mean action, of its samples, of the planner, or of training episodes; or any name in "
        "metrics.jsonl",
    )
    plot.add_argument(
        "--published",
        action="store_true",
        help="also draw published returns from pixels, where task and observations agree",
    )
    plot.set_defaults(run=_plot)


def _plot(args: argparse.Namespace) -> int:
    from latentplan.study.plot import plot

    print(plot(args.run_folder, args.out, metric=args.metric, with_published=args.published))
    return 0


def _add_scores(commands: Commands) -> None:
    scores = commands.add_parser(
        "scores", help="write the returns of runs in the forms that other plotting scripts read"
    )
    _add_run_folders(scores)
    scores.add_argument(
        "--format",
        choices=("dreamerv3", "tdmpc2", "csv"),
        required=True,
        help="dreamerv3: JSON of training episodes, or a folder per run with scores.jsonl; "
        "tdmpc2: a table of evaluations per task; csv: one table of all returns",
    )
    scores.add_argument(
        "--out",
        type=path,
        metavar="FILE",
        help="a file (.json, .json.gz or .csv), or a folder for the files of dreamerv3 or tdmpc2; "
        "default: standard output",
    )
    scores.add_argument(
        "--metric",
        choices=("train", "eval", "sample", "planner"),
        default="",
        help="returns of training episodes, or of evaluations of the policy's mean action, of its "
        "samples, or of the planner; default: train for dreamerv3, eval for tdmpc2",
    )
    scores.add_argument(
        "--method", default="", metavar="NAME", help="name of the method; default: the ablation"
    )
    scores.set_defaults(run=_scores)


def _add_run_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", type=path, metavar="RUN", nargs="+", help="folders of trained runs"
    )


def _scores(args: argparse.Namespace) -> int:
    from latentplan.study.scores import scores

    text = scores(args.run_folder, args.format, args.out, metric=args.metric, method=args.method)
    print(text.rstrip("\n"))
    return 0


def _add_tensorboard(commands: Commands) -> None:
    tensorboard = commands.add_parser("tensorboard", help="start TensorBoard for runs")
    tensorboard.add_argument(
        "run_folder", type=path, metavar="RUN", nargs="+", help="run folders, or a folder of runs"
    )
    tensorboard.add_argument(
        "--host", default="localhost", help="default: localhost; in a container: 0.0.0.0"
    )
    tensorboard.add_argument("--port", type=int, default=6006, help="default: 6006")
    tensorboard.set_defaults(run=_tensorboard)


def _tensorboard(args: argparse.Namespace) -> NoReturn:
    folders: list[Path] = args.run_folder
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder.")
    logdir = _log_folder(folders)
    address = ["--host", args.host, "--port", str(args.port)]
    # This process becomes the server. A signal then reaches the server, and none is left behind.
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *logdir, *address])


def _log_folder(folders: list[Path]) -> list[str]:
    """The arguments of TensorBoard that name the folders."""
    named = _short_names(folders)
    if len(named) == 1:
        return ["--logdir", str(folders[0])]
    # TensorBoard splits a list at commas, and a name from its folder at the first colon.
    if not any("," in str(folder) or ":" in name for name, folder in named.items()):
        return ["--logdir_spec", ",".join(f"{name}:{folder}" for name, folder in named.items())]
    # The folder stays, because this process becomes the server. It holds nothing but these links.
    links = Path(tempfile.mkdtemp(prefix="latentplan-tensorboard-"))
    for name, folder in named.items():
        (links / name).parent.mkdir(parents=True, exist_ok=True)
        (links / name).symlink_to(folder, target_is_directory=True)
    return ["--logdir", str(links)]


def _short_names(folders: list[Path]) -> dict[str, Path]:
    """Name each folder by the last parts of its path, as many as make the names different."""
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
    bench = commands.add_parser(
        "bench", help="time an update by its parts, the environment, and the planner"
    )
    bench.add_argument(
        "items", nargs="*", metavar="key=value", help="overrides of the configuration"
    )
    bench.add_argument(
        "--size", help="a size (see `latentplan list sizes`); default: as in training"
    )
    bench.add_argument("--planning", action="store_true", help="also time the planner")
    bench.add_argument(
        "--repeats", type=int, default=7, help="interleaved repetitions of every part; default: 7"
    )
    bench.add_argument(
        "--seconds", type=float, default=5.0, help="seconds of stepping the environment; default: 5"
    )
    bench.add_argument(
        "--loop",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="also train for this many seconds",
    )
    bench.add_argument(
        "--ablations",
        nargs="+",
        metavar="NAME",
        help="time only the updates of these ablations, and compare them with the first one",
    )
    bench.add_argument(
        "--json", type=expanded, metavar="FILE", help="also write the results to this file"
    )
    bench.add_argument(
        "--against", type=expanded, metavar="FILE", help="compare with an earlier --json file"
    )
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from latentplan.bench.measure import bench
    from latentplan.bench.report import compare, describe, read_json, write_json
    from latentplan.config.loading import load

    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {args.repeats}.")
    size = [f"size={args.size}"] if args.size else []
    if args.ablations:
        return _bench_ablations(args, size)
    earlier = read_json(args.against) if args.against else None
    results = [
        bench(
            load(overrides=[*size, *args.items]),
            repeats=args.repeats,
            env_seconds=args.seconds,
            planning=args.planning,
            loop_seconds=args.loop,
        )
    ]
    print(describe(results))
    if earlier is not None:
        print(compare(results, earlier))
    if args.json:
        write_json(args.json, results)
    return 0


def _bench_ablations(args: argparse.Namespace, size: list[str]) -> int:
    from latentplan.bench.updates import ablation_cost, describe_ablations

    for name in ("json", "against", "loop", "planning"):
        if getattr(args, name):
            raise UserError(f"--{name} and --ablations cannot be used together.")
    # argparse also takes the overrides behind the names as names.
    names = [name for name in args.ablations if "=" not in name]
    overrides = [name for name in args.ablations if "=" in name]
    if not names:
        raise UserError("--ablations needs at least one name.")
    cost = ablation_cost(names, [*size, *args.items, *overrides], args.repeats)
    print(describe_ablations(cost))
    return 0


def _add_list(commands: Commands) -> None:
    names = commands.add_parser("list", help="list tasks, sizes, ablations and studies")
    names.add_argument(
        "kinds",
        nargs="*",
        metavar="KIND",
        help="tasks, sizes, ablations, studies; default: all",
    )
    names.set_defaults(run=_list)


def _list(args: argparse.Namespace) -> int:
    from latentplan.config.reference import KINDS, listing

    for kind in args.kinds:
        if kind not in KINDS:
            raise UserError(f"There is no list of {kind!r}; there are: {', '.join(KINDS)}.")
    print("\n\n".join(listing(kind) for kind in args.kinds or KINDS))
    return 0
