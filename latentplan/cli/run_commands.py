"""Commands that train, show, measure and export a run. Modules are imported when one runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from latentplan.cli.arguments import (
    Commands,
    load,
    take_config,
    take_module,
    take_plan,
    take_run,
)
from latentplan.runtime import cores


def add(commands: Commands) -> None:
    """All of them; each sets ``run``: parsed arguments -> exit code."""
    for add_one in (
        _add_train,
        _add_config,
        _add_eval,
        _add_imagine,
        _add_calibrate,
        _add_report,
        _add_export,
    ):
        add_one(commands)


def _add_train(commands: Commands) -> None:
    train = commands.add_parser("train", help="train an agent, or go on with a run folder")
    take_config(train)
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    config = load(args)
    import torch

    from latentplan.training.loop import train

    cores.warn_if_busy(config.train.threads or torch.get_num_threads())
    train(config)
    return 0


def _add_config(commands: Commands) -> None:
    config = commands.add_parser(
        "config", help="print the resolved configuration, or explain its keys"
    )
    take_config(config)
    config.add_argument(
        "--explain",
        nargs="*",
        metavar="KEY",
        help="print meaning, type, default and bounds of keys or sections; without names: of all",
    )
    config.set_defaults(run=_config)


def _config(args: argparse.Namespace) -> int:
    if args.explain is not None:
        from latentplan.config.reference import explain

        print(explain(args.explain))
        return 0
    config = load(args)
    from latentplan.config.loading import to_yaml
    from latentplan.envs import parse_task

    parse_task(config.task)
    print(to_yaml(config), end="")
    return 0


def _add_eval(commands: Commands) -> None:
    evaluate = commands.add_parser("eval", help="score a run; JSON on standard output, and a video")
    take_run(evaluate)
    evaluate.add_argument("--episodes", type=int, default=10)
    evaluate.add_argument("--seed", type=int, default=0, help="never one that training saw")
    evaluate.add_argument(
        "--policy",
        choices=("mean", "sample", "planner"),
        default="mean",
        help="the actor's mean action (default), its samples, or a plan of several candidates",
    )
    take_plan(evaluate)
    evaluate.add_argument("--video", help="path of the mp4 or GIF; default: in the run folder")
    evaluate.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    cores.limit_threads_to_idle_cores()
    from latentplan.evaluation.evaluate import evaluate, to_json

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
    take_run(imagine)
    imagine.add_argument("--out", help="default: RUN/imagine")
    imagine.add_argument("--seed", type=int, default=0, help="never one that training saw")
    take_plan(imagine)
    imagine.set_defaults(run=_imagine)


def _imagine(args: argparse.Namespace) -> int:
    cores.limit_threads_to_idle_cores()
    from latentplan.evaluation.evaluate import to_json
    from latentplan.inspection.imagination_report import imagine

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
    take_run(calibrate)
    calibrate.add_argument("--episodes", type=int, default=10)
    calibrate.add_argument(
        "--unseen", default="", metavar="TASK", help="a variant never trained on"
    )
    calibrate.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    cores.limit_threads_to_idle_cores()
    from latentplan.evaluation.evaluate import to_json
    from latentplan.inspection.calibration_report import calibrate

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
    take_module(page)
    page.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    cores.limit_threads_to_idle_cores()
    from latentplan.study.html_report import write_page

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
    cores.limit_threads_to_idle_cores()
    from latentplan.deploy.export import export
    from latentplan.evaluation.evaluate import to_json

    print(to_json(export(args.run_folder, args.out)))
    return 0
