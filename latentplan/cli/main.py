"""The command line. It maps arguments to an exit code, and prints one sentence for an error."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys

from latentplan import __version__
from latentplan.cli import machine_commands, run_commands
from latentplan.types import UserError

# Any write may fail with these errors, sometimes without the name of a file. No data is lost then,
# because important files are replaced only after they were written completely.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# An OpenMP thread that waits for others checks this many times (about 70 us) before it sleeps. With
# the default of 300,000, an update with two threads was 30 times slower while other programs used
# the cores. With this value it is 5 times slower. On idle cores both values are equally fast.
# OpenMP reads the value when torch is imported.
SPINS = "20000"
EPILOG = """\
examples:
  latentplan train task=walker_walk run_dir=runs/walker seed=1
  latentplan train my.yaml env.repeat=2 world.members=7
  latentplan eval runs/walker --episodes 10 --video walker.mp4
  latentplan config task=cheetah_run size=12m
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the name of the program. None: those of this process.

    Returns:
        The exit code: 0 for success, 2 for an error of the user, 130 after Ctrl-C, 141 if the
        reader of the output has closed it.
    """
    args = _parse(argv)
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"latentplan: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # The reader of our output has ended, for example `head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if not error.filename and error.errno not in DISK_FULL:
            raise
        where = error.filename or "a file of the run"
        print(f"latentplan: {where}: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse arguments. ``key=value`` may occur anywhere; argparse alone accepts only one group."""
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    if others:
        if not hasattr(args, "items") or any("=" not in x or x.startswith("-") for x in others):
            hint = "; keys are set as in task=walker_walk" if hasattr(args, "items") else ""
            parser.error(f"unrecognized arguments: {' '.join(others)}{hint}")
        args.items += others
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latentplan",
        description="Train agents from pixels with a latent world model, and inspect them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    run_commands.add(commands)
    machine_commands.add(commands)
    return parser
