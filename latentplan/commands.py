"""The commands: what each takes, and what it runs. Modules are imported when a command runs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentplan import cores
from latentplan.types import UserError

if TYPE_CHECKING:
    from latentplan.schema import Config

Commands = Any  # argparse has no public name for what add_subparsers returns


def add_commands(commands: Commands) -> None:
    """All of them; each sets ``run``: parsed arguments -> exit code."""
    for add in (
        *(_add_train, _add_config, _add_eval, _add_imagine, _add_calibrate, _add_report),
        *(_add_export, _add_study, _add_tensorboard, _add_doctor, _add_bench),
    ):
        add(commands)


# --- what several commands take -------------------------------------------------------------


def _take_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items",
        nargs="*",
        metavar="FILE|key=value",
        help="YAML files and overrides; later ones win (see `latentplan config` for all keys)",
    )


def _take_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan",
        nargs="+",
        default=[],
        metavar="key=value",
        help="plan otherwise than in training, for example candidates=16 horizon=8 act_rate=0.5",
    )


def _take_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN")
    parser.add_argument("--device", default="auto")
    _take_module(parser)


def _take_module(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--module",
        default="",
        metavar="FILE",
        help="the file of an environment of your own, where it has moved since training",
    )


def _load(args: argparse.Namespace) -> Config:
    from latentplan.config import load

    files = [item for item in args.items if "=" not in item]
    return load(files, [item for item in args.items if "=" in item])


# --- the commands ---------------------------------------------------------------------------


def _add_train(commands: Commands) -> None:
    train = commands.add_parser("train", help="train an agent, or go on with a run folder")
    _take_config(train)
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    config = _load(args)
    import torch

    from latentplan.train import train

    cores.warn_if_busy(config.train.threads or torch.get_num_threads())
    train(config)
    return 0


def _add_config(commands: Commands) -> None:
    config = commands.add_parser("config", help="print the resolved configuration")
    _take_config(config)
    config.set_defaults(run=_config)


def _config(args: argparse.Namespace) -> int:
    config = _load(args)
    from latentplan.config import to_yaml
    from latentplan.envs import parse_task

    parse_task(config.task)
    print(to_yaml(config), end="")
    return 0


def _add_eval(commands: Commands) -> None:
    evaluate = commands.add_parser("eval", help="score a run; JSON on standard output, and a video")
    _take_run(evaluate)
    evaluate.add_argument("--episodes", type=int, default=10)
    evaluate.add_argument("--seed", type=int, default=0, help="never one that training saw")
    evaluate.add_argument(
        "--policy",
        choices=("mean", "sample", "planner"),
        default="mean",
        help="the actor's mean action (default), its samples, or a plan of several candidates",
    )
    _take_plan(evaluate)
    evaluate.add_argument("--video", help="path of the mp4 or GIF; default: in the run folder")
    evaluate.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    cores.leave_busy()
    from latentplan.evaluate import evaluate, to_json

    result = evaluate(
        args.run_folder,
        episodes=args.episodes,
        seed=args.seed,
        policy=args.policy,
        plan=args.plan,
        video=args.video,
        device=args.device,
        module=args.module,
    )
    print(to_json(result))
    return 0


def _add_imagine(commands: Commands) -> None:
    imagine = commands.add_parser(
        "imagine", help="films of what a run imagines: files, TensorBoard, projector"
    )
    _take_run(imagine)
    imagine.add_argument("--out", help="default: RUN/imagine")
    imagine.add_argument("--seed", type=int, default=0, help="never one that training saw")
    _take_plan(imagine)
    imagine.set_defaults(run=_imagine)


def _imagine(args: argparse.Namespace) -> int:
    cores.leave_busy()
    from latentplan.evaluate import to_json
    from latentplan.imagine import imagine

    result = imagine(
        args.run_folder,
        out=args.out,
        seed=args.seed,
        plan=args.plan,
        device=args.device,
        module=args.module,
    )
    print(to_json(result))
    return 0


def _add_calibrate(commands: Commands) -> None:
    calibrate = commands.add_parser(
        "calibrate", help="does the uncertainty know where the model errs? JSON, plot, TensorBoard"
    )
    _take_run(calibrate)
    calibrate.add_argument("--episodes", type=int, default=10)
    calibrate.add_argument(
        "--unseen", default="", metavar="TASK", help="a variant never trained on"
    )
    calibrate.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    cores.leave_busy()
    from latentplan.calibrate import calibrate
    from latentplan.evaluate import to_json

    report = calibrate(
        args.run_folder,
        episodes=args.episodes,
        unseen=args.unseen,
        device=args.device,
        module=args.module,
    )
    print(to_json(report))
    return 0


def _add_report(commands: Commands) -> None:
    page = commands.add_parser("report", help="runs as one HTML file: scores, curves, films")
    page.add_argument("run_folder", metavar="RUN", nargs="+", type=Path)
    page.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE")
    page.add_argument("--device", default="auto")
    _take_module(page)
    page.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    cores.leave_busy()
    from latentplan.study.page import write_page

    print(write_page(args.run_folder, args.out, device=args.device, module=args.module))
    return 0


def _add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export", help="a run's policy as one file that needs nothing of latentplan"
    )
    export.add_argument("run_folder", metavar="RUN")
    export.add_argument("--out", help="FILE.pt2 or FILE.onnx; default: RUN/policy.pt2")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    cores.leave_busy()
    from latentplan.evaluate import to_json
    from latentplan.export import export

    print(to_json(export(args.run_folder, args.out)))
    return 0


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
    from latentplan.doctor import diagnose

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
    from latentplan.bench.words import compare, describe, read_json, write_json

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
