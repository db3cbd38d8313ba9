"""``console.log``: what training prints, kept in the run folder over all sessions."""

from __future__ import annotations

import logging
import os
import shlex
import time
import traceback
from io import FileIO
from pathlib import Path
from types import TracebackType

from latentplan import __version__
from latentplan.runs.provenance import command
from latentplan.types import UserError

log = logging.getLogger("latentplan")
# Its lines reach the file, but not the terminal, where the progress bar shows the same.
FILE_ONLY = logging.getLogger("latentplan.console_log")
FILE_ONLY.propagate = False
TIME = "%Y-%m-%d %H:%M:%S"


class ConsoleLog(logging.Handler):
    """Appends the lines of a session to ``console.log``, while it is used as a context manager.

    Lines are kept in memory until :meth:`begin`, so that a session that cannot start writes
    nothing. From then on every line is written at once. A failed write gives one warning, and the
    session goes on.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", TIME))
        self._path = folder / "console.log"
        self._file: FileIO | None = None
        self._waiting: list[str] = [self._heading()]
        self._begun = self._warned = False

    @staticmethod
    def _heading() -> str:
        typed = shlex.join(command())
        return f"--- session of {time.strftime(TIME)}, latentplan {__version__}: {typed}\n"

    def __enter__(self) -> ConsoleLog:
        log.addHandler(self)
        FILE_ONLY.addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write why the session ended, if an error ended it, and close the file."""
        # Only texts are logged: a record with the error would keep everything in its frames alive.
        if isinstance(error, UserError):
            FILE_ONLY.error("%s", str(error))
        elif error is not None:
            FILE_ONLY.error("%s", "".join(traceback.format_exception(error)).rstrip())
        log.removeHandler(self)
        FILE_ONLY.removeHandler(self)
        self.close()

    def begin(self) -> None:
        """Open the file, and write the lines since the session began."""
        # A link or a pipe of this name, in a folder that came from elsewhere, is not written to.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        self._begun = True
        try:
            self._file = FileIO(os.open(self._path, flags, 0o666), "ab")
        except OSError as error:
            self._warn(error)
            return
        waiting, self._waiting = self._waiting, []
        self._write("".join(waiting))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or keep it until :meth:`begin`."""
        line = self.format(record) + "\n"
        if self._begun:
            self._write(line)
        else:
            self._waiting.append(line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()

    def _write(self, text: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(text.encode(errors="replace"))
        except OSError as error:  # for example, the disk is full
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True  # before the warning, which reaches this handler too
            log.warning("%s cannot be written: %s.", self._path, error.strerror)
