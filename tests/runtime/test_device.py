"""The devices that torch can use. The GPU is simulated, because this machine may have none."""

from __future__ import annotations

import logging

import pytest
import torch

from latentplan.agent import use_bfloat16
from latentplan.runtime.device import _runs_on, has_cuda

BUILT = ["sm_75", "sm_80", "sm_86", "sm_90a", "compute_90"]


@pytest.mark.parametrize(
    ("capability", "usable"),
    [
        ((6, 1), False),
        ((7, 0), False),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((12, 0), True),
    ],
)
def test_a_gpu_is_used_only_if_torch_supports_it(
    capability: tuple[int, int],
    usable: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT)
    with caplog.at_level(logging.WARNING, "latentplan"):
        assert has_cuda.__wrapped__() == usable
    assert len(caplog.messages) == (not usable)
    if not usable:
        major, minor = capability
        assert "Some GPU is not used" in caplog.text and f"{major}.{minor}" in caplog.text


@pytest.mark.parametrize(
    ("arch", "runs"),
    [("sm_80", True), ("sm_86", True), ("sm_89", False), ("sm_75", False), ("gfx90a", True)],
)
def test_architecture_names_are_compared_with_the_capability(arch: str, runs: bool) -> None:
    assert _runs_on(arch, (8, 6)) == runs


def test_a_machine_without_a_gpu_gets_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_cuda.__wrapped__() and not caplog.messages


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("avx512", [True, False])
def test_bfloat16_is_used_where_the_hardware_supports_it(
    amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    cpu = torch.device("cpu")
    assert use_bfloat16("auto", cpu) == (amx or avx512)
    assert use_bfloat16("bfloat16", cpu) and not use_bfloat16("float32", cpu)
