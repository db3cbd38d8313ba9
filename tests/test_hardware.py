"""What torch can use of a machine that is told of here, for this one may have no GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from latentplan.hardware import has_cuda


@pytest.mark.parametrize("kernels", [True, False])
def test_a_gpu_counts_where_torch_can_use_it(
    kernels: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def zeros(n: int, device: str) -> torch.Tensor:
        if not kernels:
            raise RuntimeError("CUDA error: no kernel image is available\nmore lines")
        return torch.ones(n)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    with caplog.at_level(logging.WARNING, "latentplan"):
        assert has_cuda.__wrapped__() == kernels
    said = "the GPU cannot be used: CUDA error: no kernel image is available"
    assert caplog.messages == ([] if kernels else [said])


def test_no_gpu_is_no_reason_to_warn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_cuda.__wrapped__() and not caplog.messages
