"""What all tests share: one thread, and the long tests at the end."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # tests are small: threads cost more than they give


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: takes minutes; runs after everything else")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)  # stable
