"""The command line. It maps arguments to an exit code, and prints one sentence for an error."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator

from latentplan import __version__
from latentplan.cli import data_commands, machine_commands, run_commands
from latentplan.cli.arguments import SIGNALED
from latentplan.types import UserError

# Any write may fail with these errors, sometimes without the name of a file. No data is lost then,
# because important files are replaced only after they were written completely.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_HANDLES = (errno.EMFILE, errno.ENFILE)  # of the process, and of the whole system
# An OpenMP thread that waits for others checks this many times (about 70 us) before it sleeps. With
# the default of 300,000, an update with two threads was 30 times slower while other programs used
# the cores. With this value it is 5 times slower. On idle cores both values are equally fast.
# OpenMP reads the value when torch is imported.
SPINS = "20000"
EPILOG = """\
examples:
  latentplan train task=walker_walk run_dir=runs/walker seed=1
  latentplan train my.yaml env.repeat=2 world.members=7
  latentplan resume runs/walker steps=2000000
  latentplan eval runs/walker --episodes 10 --video walker.mp4
  latentplan config task=cheetah_run size=12m

exit codes:
  0 success; 1 a run of a study failed, or this program has a fault; 2 an error of the user;
  130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the name of the program. None: those of this process.

    Returns:
        The exit code: 0 for success, 2 for an error of the user, 128 plus the number of a signal
        that stopped the command, 141 if the reader of the output has closed it.
    """
    args = _parse(argv)
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if hasattr(args, "run_folder"):
        # A command may be run inside a stranger's run folder. Without this, the processes that it
        # starts would import Python files of the working folder in the place of installed ones.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # The reader of our output has ended, for example `head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"latentplan: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # its argument is the signal, if one of our handlers made it
        return SIGNALED + (stop.args[0] if stop.args else signal.SIGINT)


def _sentence(error: Exception) -> str | None:
    """The sentence for an error that the user can correct; None for a fault of the program."""
    causes = list(_causes(error))
    if any(map(_lacks_file_handles, causes)):
        return (
            "Too many files are open: allow this program more file handles, for example with "
            "`ulimit -n 4096`."
        )
    if isinstance(error, UserError):
        return str(error)
    for cause in causes:
        if isinstance(cause, OSError) and (
            cause.errno in DISK_FULL or (cause is error and cause.filename)
        ):
            return f"{cause.filename or 'a file of the run'}: {cause.strerror}."
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the errors that it comes from. Libraries turn errors of the system into others.

    The errors are those that a traceback shows.
    """
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _lacks_file_handles(error: BaseException) -> bool:
    """Whether an error is the lack of file handles, of which some libraries keep only the text."""
    if getattr(error, "errno", None) in NO_HANDLES:
        return True
    return any(os.strerror(number) in str(error) for number in NO_HANDLES)


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
    data_commands.add(commands)
    machine_commands.add(commands)
    return parser
