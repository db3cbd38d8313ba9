from __future__ import annotations

import pytest


@pytest.fixture
def without_spare_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """New replays have no spare rows, so that a test can overwrite a row soon."""
    monkeypatch.setattr("latentplan.data.replay._spare_rows", lambda rows: 0)
