"""``console.log``: what it holds, and that it never stops a run."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import EPISODE, run_config

from latentplan.runs import console_log
from latentplan.runs.console_log import FILE_ONLY, ConsoleLog
from latentplan.training.session import train
from latentplan.types import UserError

log = logging.getLogger("latentplan")
HEADING = r"--- session of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, latentplan \S+: .+"


@pytest.fixture(autouse=True)
def info() -> Iterator[None]:
    """The level that the command line sets."""
    before = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(before)


class Terminal(logging.Handler):
    """A handler of the root logger, as the command line has one. Collects messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    handler = Terminal()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def lines(folder: Path) -> list[str]:
    return (folder / "console.log").read_text().splitlines()


def test_sessions_are_appended_each_behind_a_heading(tmp_path: Path) -> None:
    for number in range(2):
        with ConsoleLog(tmp_path) as console:
            log.info("before %d", number)
            assert number or not (tmp_path / "console.log").exists()
            console.begin()
            log.warning("after %d", number)
            assert lines(tmp_path)[-1].endswith(f"after {number}")  # at once
        log.info("outside")
    texts = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", x) for x in lines(tmp_path)]
    assert re.fullmatch(HEADING, texts.pop(0)) and re.fullmatch(HEADING, texts.pop(2))
    assert texts == ["before 0", "after 0", "before 1", "after 1"]


def test_a_session_that_cannot_start_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError), ConsoleLog(tmp_path):
        log.info("before")
        raise UserError("No device.")
    assert list(tmp_path.iterdir()) == []
    assert not any(isinstance(x, ConsoleLog) for x in (*log.handlers, *FILE_ONLY.handlers))


def test_the_error_that_ends_a_session_is_in_the_file(tmp_path: Path) -> None:
    for error in (UserError("The disk is full."), ValueError("a bug")):
        with pytest.raises(type(error)), ConsoleLog(tmp_path) as console:
            console.begin()
            raise error
    text = (tmp_path / "console.log").read_text()
    assert re.search(r"^[-\d]+ [:\d]+ The disk is full\.$", text, re.MULTILINE)
    assert text.count("Traceback") == 1 and "ValueError: a bug\n" in text


def test_lines_for_the_file_alone_do_not_reach_other_handlers(
    tmp_path: Path, terminal: Terminal
) -> None:
    with ConsoleLog(tmp_path) as console:
        console.begin()
        FILE_ONLY.info("frame 1/2")
    FILE_ONLY.info("frame 2/2")
    assert lines(tmp_path)[-1].endswith(" frame 1/2") and terminal.messages == []


def test_a_full_disk_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = os.open
    monkeypatch.setattr(
        console_log.os, "open", lambda path, flags, mode: opened("/dev/full", os.O_WRONLY)
    )
    with ConsoleLog(tmp_path) as console:
        console.begin()
        log.info("one")
        log.info("two")
    (warning,) = (x for x in caplog.messages if "cannot be written" in x)
    assert warning == f"{tmp_path / 'console.log'} cannot be written: No space left on device."


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_a_regular_file_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path, other = tmp_path / "console.log", tmp_path / "other"
    other.write_text("kept")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with ConsoleLog(tmp_path) as console:
        console.begin()
        log.info("one")
    assert len([x for x in caplog.messages if "cannot be written" in x]) == 1
    assert other.read_text() == "kept"


def test_a_run_keeps_what_it_prints(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path / "run", f"steps={2 * EPISODE}")
    train(config)
    printed = [x for message in terminal.messages for x in message.splitlines()]
    kept = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", x) for x in lines(tmp_path / "run")]
    assert kept[1:] == printed and any(x.startswith("frame 128/128: return") for x in kept)
    # On a terminal the bar takes the place of the lines of progress, which the file still gets.
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    terminal.messages.clear()
    train(run_config(tmp_path / "run", f"steps={4 * EPISODE}"))
    assert not any(x.startswith("frame ") for x in terminal.messages)
    more = (tmp_path / "run" / "console.log").read_text()
    assert "frame 256/256: return" in more and more.count("--- session of ") == 2
    assert "resuming from frame 128" in more


def test_a_refused_start_adds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(run_config(folder, f"steps={EPISODE}"))
    before = (folder / "console.log").read_bytes()
    with pytest.raises(UserError, match="seed"):
        train(run_config(folder, f"steps={2 * EPISODE}", "seed=9"))
    assert (folder / "console.log").read_bytes() == before
