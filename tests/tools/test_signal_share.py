"""The benchmark of how much of an actor's gradient is signal."""

from __future__ import annotations

from pathlib import Path

import pytest
import signal_share
import torch

from latentplan.runs.source import RunSource


def test_the_share_is_that_of_the_common_part() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(1, 2000, generator=generator)
    noise = torch.randn(200, 2000, generator=generator)
    assert signal_share.signal_share(signal.expand(3, -1)) == pytest.approx(1)
    assert signal_share.signal_share(noise) == pytest.approx(0, abs=0.01)
    assert signal_share.signal_share(signal + 3 * noise) == pytest.approx(0.1, abs=0.01)


def test_both_estimators_are_measured_on_the_same_batches(run: Path) -> None:
    found = {x: signal_share.gradients(RunSource(run), x, 2) for x in signal_share.GRADIENTS}
    again = signal_share.gradients(RunSource(run), "reinforce", 2)
    assert torch.equal(found["reinforce"], again)
    assert not torch.equal(*found.values()) and found["pathwise"].shape == again.shape
