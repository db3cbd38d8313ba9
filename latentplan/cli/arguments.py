"""Arguments that several commands have."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentplan.config.schema import Config

SIGNALED = 128  # plus the number of a signal: the exit code of a command that the signal stopped
Commands = Any  # the result of `add_subparsers`, whose type has no public name


def expanded(text: str) -> str:
    """A path argument that may be empty. A leading ``~`` is the home folder.

    A shell leaves ``~`` as it is in quotes and behind ``=``, as in ``--out=~/report``.
    """
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """A path argument. A leading ``~`` is the home folder."""
    return Path(expanded(text))


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add configuration files and overrides, as ``items``."""
    parser.add_argument(
        "items",
        nargs="*",
        metavar="FILE|key=value",
        help="YAML files and overrides; later ones replace earlier ones. "
        "`latentplan config --explain` lists all keys",
    )


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add overrides of the planner's settings, as ``plan``."""
    parser.add_argument(
        "--plan",
        nargs="+",
        default=[],
        metavar="key=value",
        help="planner settings that differ from those of training, for example candidates=16 "
        "horizon=8 act_rate=0.5",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a run, a checkpoint, the device, and the code of its environment."""
    parser.add_argument("run_folder", type=path, metavar="RUN", help="folder of a trained run")
    add_checkpoint_argument(parser)
    add_device_argument(parser)
    add_code_arguments(parser)


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a Python function that :func:`add_run_arguments` has read."""
    return {
        "device": args.device,
        "module": args.module,
        "trust": args.trust,
        "checkpoint": args.checkpoint,
    }


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``checkpoint``, the name of a kept checkpoint."""
    parser.add_argument(
        "--checkpoint",
        default="",
        metavar="NAME",
        help="a kept checkpoint: `best`, or a number of frames; default: the newest",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``device``."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")


def add_code_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``module``, the file of the user's environment, and ``trust``."""
    parser.add_argument(
        "--module",
        type=expanded,
        default="",
        metavar="FILE",
        help="the Python file of your own environment, if it has moved since training",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run the Python files that the run's configuration names, although no training run of "
        "yours has recorded them",
    )


def load(args: argparse.Namespace) -> Config:
    """The configuration that ``items`` give.

    Raises:
        UserError: as :func:`latentplan.config.loading.load`.
    """
    from latentplan.config.loading import as_config

    return as_config(args.items)
