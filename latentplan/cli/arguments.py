"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentplan.config.schema import Config

Commands = Any  # argparse has no public name for what add_subparsers returns


def take_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items",
        nargs="*",
        metavar="FILE|key=value",
        help="YAML files and overrides; later ones win (see `latentplan config` for all keys)",
    )


def take_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan",
        nargs="+",
        default=[],
        metavar="key=value",
        help="plan otherwise than in training, for example candidates=16 horizon=8 act_rate=0.5",
    )


def take_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN")
    parser.add_argument("--device", default="auto")
    take_module(parser)


def take_module(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--module",
        default="",
        metavar="FILE",
        help="the file of an environment of your own, where it has moved since training",
    )


def load(args: argparse.Namespace) -> Config:
    from latentplan.config.loading import load

    files = [item for item in args.items if "=" not in item]
    return load(files, [item for item in args.items if "=" in item])
