"""What all tests share: one thread, and the long tests at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import EPISODE, run_config

torch.set_num_threads(1)  # tests are small: threads cost more than they give


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: takes minutes; runs after everything else")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)  # stable


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run from pixels and state; tests that write into it take a copy."""
    from latentplan.training.loop import train  # what is broken there is not to break every test

    folder = tmp_path_factory.mktemp("run") / "finished"
    return train(run_config(folder, "obs=both", f"steps={4 * EPISODE}", "log.inspect_every=128"))
