from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import run_config

from latentplan.cli.main import main
from latentplan.config.loading import to_yaml
from latentplan.envs import StepInterruptedError, VectorEnv
from latentplan.runs import checkpoint
from latentplan.training.loop import train_session
from latentplan.training.monitor import Monitor
from latentplan.training.stopping import StopInterrupt, stop_on_signal
from latentplan.world.model import WorldModel

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_requests_a_stop_and_the_second_stops_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
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
    try:
        with stop_on_signal() as stop:
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
    with stop_on_signal() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopInterrupt), stop.interruptible():
            raise AssertionError("the block was entered")


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
