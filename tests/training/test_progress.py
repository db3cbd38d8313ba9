"""The progress bar, and messages beside it."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path

import pytest
from tiny import run_config

from latentplan.training.session import train


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_messages_do_not_break_the_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger()
    monkeypatch.setattr(logger, "handlers", [handler])  # as on the command line
    caplog.set_level(logging.INFO)
    train(run_config(tmp_path / "run", "steps=128", "log.inspect_every=0"))
    text = terminal.getvalue()
    assert "frame/s" in text, "there is a bar"
    messages = re.findall(r"([^\n]*)(evaluation at frame [^\n]*)\n", text)
    assert messages
    for before, message in messages:
        # The bar was wiped before the message, and is not on its line.
        assert before.endswith("\r") or not before
        assert "frame/s" not in message
    assert logger.handlers == [handler], "messages of later code do not pass through the bar"
