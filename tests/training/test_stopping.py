from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import run_config

from latentplan.cli.main import main
from latentplan.config.loading import to_yaml
from latentplan.envs import StepInterruptedError, VectorEnv
from latentplan.runs import checkpoint
from latentplan.runs.logger import Logger
from latentplan.training.monitor import Monitor
from latentplan.training.session import train_session
from latentplan.training.stopping import Stop, StopInterrupt, stop_on_signal
from latentplan.world.model import WorldModel

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_requests_a_stop_and_the_second_stops_at_once(number: int) -> None:
    before = signal.getsignal(number)
    stop = Stop()
    with stop_on_signal(stop):
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested and stop.number == number
        signal.raise_signal(signal.SIGHUP)  # a closed terminal sends it twice
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.args == (signal.SIGTERM,)
    assert signal.getsignal(number) is before


def test_nohup_keeps_a_run_alive() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    try:
        with stop_on_signal(stop):
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("last", [False, True])
def test_the_exit_code_tells_a_stopped_run_from_one_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, last: bool
) -> None:
    report = Monitor.report

    def report_and_stop(self: Monitor, frames: int, updates: int, *, last: bool) -> None:
        report(self, frames, updates, last=last)
        if last or not at_end:
            signal.raise_signal(number)

    at_end = last
    monkeypatch.setattr(Monitor, "report", report_and_stop)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run_config(tmp_path / "run", "steps=64", "eval.every=0")))
    assert main(["train", str(file)]) == (0 if last else 128 + number)
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "owner, name", [(Monitor, "_evaluate"), (Monitor, "_inspect"), (WorldModel, "loss")]
)
def test_long_work_does_not_wait_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """An evaluation, a film or a compilation of minutes ends at once, and the run is saved."""
    items = ["steps=256", "eval.every=128", "log.inspect_every=128", "log.checkpoint_seconds=0"]
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run_config(tmp_path / "run", *items)))

    def wait(*arguments: object, **options: object) -> None:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wait)
        begin = time.monotonic()
        assert main(["train", str(file)]) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 50
    frames = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["frames"]
    assert 0 < frames < 256
    assert main(["train", str(file)]) == 0
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["step"] for row in rows if "episode/eval_score" in row]
    assert len(evaluated) == 2 and frames <= evaluated[0], (
        "the interrupted evaluation is made up for"
    )


def test_a_request_before_an_interruptible_block_ends_it() -> None:
    stop = Stop()
    with stop_on_signal(stop):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopInterrupt), stop.interruptible():
            raise AssertionError("the block was entered")


def test_a_request_waits_for_the_end_of_an_uninterrupted_part() -> None:
    stop, done = Stop(), []
    with stop_on_signal(stop):
        with pytest.raises(StopInterrupt), stop.interruptible():
            with stop.uninterrupted():
                signal.raise_signal(signal.SIGTERM)
                done.append("part")
            done.append("block")
        assert done == ["part"]
        with stop.uninterrupted():
            done.append("no block")
        assert done == ["part", "no block"]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "method, tag", [("write", "replay/rows"), ("video", "imagination/open_loop")]
)
def test_a_stop_does_not_cut_a_write_to_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, tag: str
) -> None:
    """An exception within the queue of TensorBoard's writer would end or suspend its thread."""
    original, put, stopped = getattr(Logger, method), Queue._put, []

    def put_and_stop(self: Queue, item: object) -> None:
        put(self, item)
        if not stopped:
            stopped.append(True)
            signal.raise_signal(signal.SIGTERM)

    def log(self: Logger, *arguments: Any, **options: Any) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(Queue, "_put", put_and_stop)
            return original(self, *arguments, **options)

    file = tmp_path / "run.yaml"
    items = ["steps=256", "eval.every=0", "log.every=128", "log.inspect_every=128"]
    file.write_text(to_yaml(run_config(tmp_path / "run", *items)))
    with monkeypatch.context() as patch:
        patch.setattr(Logger, method, log)
        begin = time.monotonic()
        assert main(["train", str(file)]) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 50
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert tag in events.Tags()["scalars" if method == "write" else "images"]
    assert 0 < checkpoint.load(tmp_path / "run" / "checkpoint.pt")["frames"] < 256


def test_the_end_of_the_minutes_is_a_success(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", "steps=1_000_000", "train.minutes=1e-6", "eval.every=0")
    assert train_session(config) == (tmp_path / "run", 0)


def test_a_run_whose_environment_hangs_saves_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = VectorEnv.step_wait, []

    def step_wait(self: VectorEnv, stopping: Callable[[], bool]) -> object:
        calls.append(stopping())
        if len(calls) == 30:
            signal.raise_signal(signal.SIGTERM)
            assert stopping()
            raise StepInterruptedError
        return original(self, stopping)

    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run_config(tmp_path / "run", "steps=256", "eval.every=0")))
    with monkeypatch.context() as patch:
        patch.setattr(VectorEnv, "step_wait", step_wait)
        assert main(["train", str(file)]) == 128 + signal.SIGTERM
    assert not any(calls) and len(calls) == 30
    assert 0 < checkpoint.load(tmp_path / "run" / "checkpoint.pt")["frames"] < 256
    assert main(["train", str(file)]) == 0
