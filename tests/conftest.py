"""Settings and fixtures of all tests: one thread, long tests last, and a finished run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import EPISODE, run_config

torch.set_num_threads(1)  # more threads would slow down such small tensors


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: the test takes minutes and runs after all others")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The sort is stable, so the other tests keep their order.
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with images and state. A test that writes into it must copy it first."""
    # Imported here, so that an error in that module does not break every test.
    from latentplan.training.session import train

    folder = tmp_path_factory.mktemp("run") / "finished"
    return train(run_config(folder, "obs=both", f"steps={4 * EPISODE}", "log.inspect_every=128"))


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder of the tests' own, so that no test writes into the user's home."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTPLAN_STATE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def heard_signals() -> Iterator[None]:
    """Let this process and its children take SIGINT and SIGHUP.

    A shell starts jobs in the background with SIGINT ignored, nohup ignores SIGHUP, and processes
    inherit both.
    """
    numbers = (signal.SIGINT, signal.SIGHUP)
    ignored = [x for x in numbers if signal.getsignal(x) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def environment_variables() -> Iterator[None]:
    """Undo what a test does to the environment: `main` sets variables for processes it starts."""
    with mock.patch.dict(os.environ):
        yield
