"""The command line: arguments in, exit code out, one sentence about a mistake."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys

from latentplan import __version__
from latentplan.cli import machine_commands, run_commands
from latentplan.types import UserError

# Any write may meet these, some without naming the file; what matters is written whole or not at
# all, so nothing is lost.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Threads that wait for others look again so often before they sleep, some 70 us. OpenMP's 300,000
# made an update of two threads 30 times slower where other programs use the cores, with this it is
# 5 times; on idle cores both are equally fast. Read when torch is imported.
SPINS = "20000"
EPILOG = """\
examples:
  latentplan train task=walker_walk run_dir=runs/walker seed=1
  latentplan train my.yaml env.repeat=2 world.members=7
  latentplan eval runs/walker --episodes 10 --video walker.mp4
  latentplan config task=cheetah_run size=12m
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it did its work, 2 after a mistake in what was asked for."""
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
    except BrokenPipeError:  # whoever read our output, `head` for one, has read enough
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
    """``key=value`` may stand anywhere; argparse by itself takes one group of them only."""
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
        description="Train agents from pixels inside a latent world model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    run_commands.add(commands)
    machine_commands.add(commands)
    return parser
