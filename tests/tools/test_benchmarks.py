"""The benchmarks of `tools/benchmarks`: a plain update, the peak rate, and growth."""

from __future__ import annotations

import json
from pathlib import Path

import against_reference
import growth
import peak_rate
import pytest
import torch
from against_reference import WIDTHS
from peak_rate import FlopCount
from tiny import BENCH_OVERRIDES

from latentplan.bench.parts import FULL
from latentplan.config.loading import load
from latentplan.nn.convolution import DoublingConv, HalvingConv


def test_an_update_is_compared_with_the_plain_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peak_rate, "SIDE", 64)  # bfloat16 may be emulated, which is slow
    path = tmp_path / "result.json"
    flags = ["--widths", "small", "--repeats", "2", "--json", str(path)]
    assert against_reference.main([*flags, *BENCH_OVERRIDES]) == 0
    text = capsys.readouterr().out
    assert "full update / plain reference" in text and "x peak" in text
    result = json.loads(path.read_text())
    seconds = result["seconds"]
    plain = seconds[against_reference.PLAIN]
    assert result["ratio"] == pytest.approx(seconds[FULL]["median"] / plain["median"])
    assert set(result["floors"]) == set(seconds) - {"optimizer", against_reference.PLAIN}
    for name, floor in result["floors"].items():
        assert floor["times_floor"] == pytest.approx(seconds[name]["median"] / floor["floor"])
    assert against_reference.main(["--widths", "cpu", "obs=state", *BENCH_OVERRIDES]) == 2
    assert "obs=pixels" in capsys.readouterr().err


def test_operations_are_counted_forward_and_backward() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with FlopCount() as count:
        (a @ b).sum().backward()
    assert count.flops == {"float32": 3 * 2 * 3 * 5 * 7}  # one product forward, two backward
    with FlopCount() as count:
        torch.randn(2, 2).bfloat16() @ torch.randn(2, 2).bfloat16()
    assert count.flops == {"bfloat16": 16}


@pytest.mark.parametrize("make", [HalvingConv, DoublingConv])
def test_the_own_operator_counts_the_operations_of_a_convolution(make: type) -> None:
    """In bfloat16, an operator of this project computes the gradient of the filters."""
    layer = make(8, 8)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        with FlopCount() as count, torch.autocast("cpu", dtype, dtype == torch.bfloat16):
            layer(x.to(dtype)).float().sum().backward()
        counts.append(count.flops)
    assert list(counts[0].values()) == list(counts[1].values()) and counts[0].keys() != counts[1]


def test_growth_changes_one_key_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "AXES", {"train.batch": (1, 64), "plan.candidates": (1, 2)})
    monkeypatch.setattr(growth, "SHAPE", (1, 2))
    path = tmp_path / "growth.png"
    overrides = ["train.length=8", "train.threads=1"]
    more = [x for x in BENCH_OVERRIDES if not x.startswith(("train.batch", "train.length"))]
    assert growth.main([str(path), "--repeats", "2", *more, *overrides]) == 0
    text = capsys.readouterr().out
    times = [float(x.split(":")[1]) for x in text.splitlines()[1].split("batch")[1].split(",")]
    assert times[1] > times[0] and "plan.candidates" in text and path.stat().st_size > 5000
    assert growth.main([str(path), "nope=1"]) == 2
    assert "nope" in capsys.readouterr().err


def test_the_widths_are_those_of_dreamerv3_torch() -> None:
    for key, deter, stoch, depth, units in (
        ("small", 128, 16, 16, 128),
        ("large", 512, 32, 32, 512),
    ):
        config = load(overrides=WIDTHS[key])
        world = config.world
        assert (world.deter, world.stoch, world.classes) == (deter, stoch, stoch)
        assert (world.depth, world.units, world.hidden) == (depth, units, units)
        assert (config.train.batch, config.train.length, config.behavior.horizon) == (16, 64, 15)
        assert config.env.image_size == 64 and config.obs == "pixels"
        # Every frame is decoded and every row is a start, as in the plain update.
        assert world.decode_fraction == config.behavior.starts_fraction == 1.0
