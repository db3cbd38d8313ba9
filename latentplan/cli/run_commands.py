"""Commands that train, evaluate, inspect and export a run. They import modules when they run."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from latentplan.cli.arguments import (
    SIGNALED,
    Commands,
    add_checkpoint_argument,
    add_code_arguments,
    add_config_arguments,
    add_device_argument,
    add_plan_arguments,
    add_run_arguments,
    expanded,
    load,
    path,
    run_options,
)
from latentplan.runtime import cores

if TYPE_CHECKING:
    from latentplan.config.schema import Config

log = logging.getLogger("latentplan")
STOPPING = (
    "Ctrl-C, SIGTERM and SIGHUP save a checkpoint and stop, with the exit codes 130, 143 and 129. "
    "The end of steps or train.minutes is exit code 0."
)
SEED_HELP = "seed of the environment; always distinct from the seeds of training; default: 0"


def add(commands: Commands) -> None:
    """Add the commands. Each sets ``run``, a function from parsed arguments to the exit code."""
    for add_one in (
        _add_train,
        _add_resume,
        _add_config,
        _add_eval,
        _add_imagine,
        _add_calibrate,
        _add_diagnose,
        _add_report,
        _add_export,
    ):
        add_one(commands)


def _add_train(commands: Commands) -> None:
    train = commands.add_parser(
        "train", help="train an agent, or go on with the run in run_dir", epilog=STOPPING
    )
    add_config_arguments(train)
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    return _train_session(load(args))


def _add_resume(commands: Commands) -> None:
    resume = commands.add_parser(
        "resume", help="go on with a run by its own configuration", epilog=STOPPING
    )
    resume.add_argument("run_folder", type=path, metavar="RUN", help="folder of a trained run")
    resume.add_argument(
        "items",
        nargs="*",
        metavar="key=value",
        help="keys that may change when a run goes on, for example steps or device",
    )
    add_code_arguments(resume)
    resume.set_defaults(run=_resume)


def _resume(args: argparse.Namespace) -> int:
    from latentplan.runs.resuming import config_to_resume
    from latentplan.runs.source import RunSource

    source = RunSource(args.run_folder, args.module, args.trust)
    return _train_session(config_to_resume(source, args.items))


def _train_session(config: Config) -> int:
    """Train until the end of the session. Returns the exit code."""
    import torch

    from latentplan.training.session import train_session

    cores.warn_if_busy(config.train.threads or torch.get_num_threads())
    number = train_session(config).stopped_by
    return SIGNALED + number if number else 0


def _add_config(commands: Commands) -> None:
    config = commands.add_parser(
        "config", help="print the resolved configuration, or explain its keys"
    )
    add_config_arguments(config)
    config.add_argument(
        "--explain",
        nargs="*",
        metavar="KEY",
        help="print meaning, type, default and bounds of these keys or sections (default: all)",
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
    evaluate = commands.add_parser(
        "eval", help="evaluate a run: print the scores as JSON, and save a video"
    )
    add_run_arguments(evaluate)
    evaluate.add_argument("--episodes", type=int, default=10, help="default: 10")
    evaluate.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    evaluate.add_argument(
        "--policy",
        nargs="+",
        choices=("mean", "sample", "planner"),
        default=["mean"],
        help="act with the actor's mean action (default), its samples, or the planner; or with "
        "several of them, each in the same episodes",
    )
    evaluate.add_argument(
        "--no-planner",
        dest="planner",
        action="store_false",
        help="do not score the planner beside the actor",
    )
    add_plan_arguments(evaluate)
    evaluate.add_argument(
        "--video",
        type=expanded,
        metavar="FILE",
        help="path of an .mp4 or .gif file, with the name of the policy if there are several; "
        "default: in the run folder, if the agent sees images",
    )
    evaluate.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    cores.limit_threads_to_idle_cores()
    from latentplan.evaluation.evaluate import evaluate, to_json

    result = evaluate(
        args.run_folder,
        episodes=args.episodes,
        seed=args.seed,
        policy=args.policy,
        planner=args.planner,
        plan=args.plan,
        video=args.video,
        **run_options(args),
    )
    print(to_json(result))
    return 0


def _add_imagine(commands: Commands) -> None:
    imagine = commands.add_parser(
        "imagine", help="render imagined rollouts and plans of a run as films and figures"
    )
    add_run_arguments(imagine)
    imagine.add_argument("--out", type=expanded, help="output folder; default: RUN/imagine")
    imagine.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    add_plan_arguments(imagine)
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
        **run_options(args),
    )
    print(to_json(result))
    return 0


def _add_calibrate(commands: Commands) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="compare the model's uncertainty with its errors: JSON, figure, TensorBoard",
    )
    add_run_arguments(calibrate)
    calibrate.add_argument("--episodes", type=int, default=10, help="default: 10")
    calibrate.add_argument(
        "--unseen",
        default="",
        metavar="TASK",
        help="a task that training never saw; the uncertainty should be higher there",
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
        **run_options(args),
    )
    print(to_json(report))
    log.info("%s", report["verdict"])
    return 0


def _add_diagnose(commands: Commands) -> None:
    diagnose = commands.add_parser(
        "diagnose", help="say in words which part of an agent may keep it from learning"
    )
    add_run_arguments(diagnose)
    diagnose.add_argument(
        "--episodes", type=int, default=4, help="for each way of acting; default: 4"
    )
    diagnose.add_argument("--json", action="store_true", help="print all numbers as JSON instead")
    diagnose.set_defaults(run=_diagnose)


def _diagnose(args: argparse.Namespace) -> int:
    cores.limit_threads_to_idle_cores()
    from latentplan.evaluation.evaluate import to_json
    from latentplan.inspection.diagnosis_report import diagnose, to_text

    report = diagnose(args.run_folder, episodes=args.episodes, **run_options(args))
    print(to_json(report) if args.json else to_text(report))
    return 0


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report", help="write one HTML file with scores, curves and films of runs"
    )
    report.add_argument(
        "run_folder", metavar="RUN", nargs="+", type=path, help="folders of trained runs"
    )
    report.add_argument(
        "--out",
        type=path,
        default=Path("report.html"),
        metavar="FILE",
        help="the HTML file; default: report.html",
    )
    add_device_argument(report)
    add_code_arguments(report)
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    cores.limit_threads_to_idle_cores()
    from latentplan.study.html_report import write_report

    options = {"device": args.device, "module": args.module, "trust": args.trust}
    print(write_report(args.run_folder, args.out, **options))
    return 0


def _add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export", help="write the policy of a run to one file that works without latentplan"
    )
    export.add_argument("run_folder", type=path, metavar="RUN", help="folder of a trained run")
    export.add_argument(
        "--out", type=expanded, help="a .pt2 or .onnx file; default: RUN/policy.pt2"
    )
    add_checkpoint_argument(export)
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    cores.limit_threads_to_idle_cores()
    from latentplan.deploy.export import export
    from latentplan.evaluation.evaluate import to_json

    print(to_json(export(args.run_folder, args.out, checkpoint=args.checkpoint)))
    return 0
