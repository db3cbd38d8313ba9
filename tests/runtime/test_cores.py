"""The number of threads while other programs use the cores."""

from __future__ import annotations

import logging
import os

import pytest

from latentplan.runtime import cores


@pytest.mark.parametrize(("busy", "threads"), [(0.2, "4"), (1.6, "2"), (9.0, "1")])
def test_inspection_commands_use_idle_cores_only(
    busy: float, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("psutil.getloadavg", lambda: (busy, 0.0, 0.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cores.limit_threads_to_idle_cores()
    assert os.environ["OMP_NUM_THREADS"] == "7", "a value that the user has set"
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores.limit_threads_to_idle_cores()
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_busy_cores_are_reported_in_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for load, threads, warned in ((0.2, 2, False), (1.0, 2, True), (5.0, 1, False)):
        monkeypatch.setattr("psutil.getloadavg", lambda load=load: (load, 0.0, 0.0))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "latentplan"):
            cores.warn_if_busy(threads)
        assert ("train.threads=1" in caplog.text) == warned
