from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentplan.runtime import clock
from latentplan.runtime.clock import Every, Ratio, Stopwatch


def _fires(every: Every, times: range | list[float]) -> list[float]:
    return [now for now in times if every(now)]


def test_every_fires_once_per_interval_and_stays_on_its_grid() -> None:
    assert _fires(Every(10), range(0, 45, 1)) == [10, 20, 30, 40]
    assert _fires(Every(10), range(0, 45, 4)) == [12, 20, 32, 40]
    assert _fires(Every(10), [0, 55, 56, 60, 61]) == [55, 60]  # a gap is answered once
    assert _fires(Every(0.5), [0.0, 0.6, 0.9, 1.1]) == [0.6, 1.1]


def test_every_can_begin_earlier_or_never() -> None:
    assert _fires(Every(10, first=0), range(25)) == [0, 10, 20]
    assert _fires(Every(300, first=50), range(0, 1000, 7)) == [56, 350, 651, 952]
    assert _fires(Every(0), range(100)) == []


def test_every_resumes() -> None:
    whole, half = Every(10), Every(10)
    expected = _fires(whole, range(100))
    begun = _fires(half, range(37))
    again = Every(10)
    again.load_state_dict(half.state_dict())
    assert begun + _fires(again, range(37, 100)) == expected


def test_another_interval_counts_at_once() -> None:
    """A resumed run with a shorter interval does not wait for the due time of the longer one."""
    before = Every(100)
    assert before(100)
    after = Every(10)
    after.load_state_dict(before.state_dict())
    assert after(120) and not after(125) and after(130)
    old = Every(100)
    old.load_state_dict({"due": 300.0})  # from a checkpoint without the interval
    assert not old(250) and old(300)


@pytest.mark.parametrize(
    ("ratio", "rows", "decisions", "updates"),
    [(512, 1024, 1000, 500), (64, 1024, 1000, 62), (2048, 1024, 10, 20), (0, 1024, 100, 0)],
)
def test_ratio_gives_the_expected_number_of_updates(
    ratio: float, rows: int, decisions: int, updates: int
) -> None:
    clock = Ratio(ratio, rows)
    assert clock(0) == 0
    assert sum(clock(n) for n in range(1, decisions + 1)) == updates


def test_ratio_accumulates_fractions_evenly() -> None:
    ratio = Ratio(1, 3)
    assert [ratio(n) for n in range(10)] == [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]
    ratio = Ratio(0.1, 0.3)  # not exact in binary: off by one update at the most
    assert sum(ratio(n) for n in range(3001)) in (999, 1000)
    ratio = Ratio(512, 1024)
    assert [ratio(n) for n in range(0, 24, 4)] == [0, 2, 2, 2, 2, 2]


def test_ratio_gives_no_updates_for_the_prefill() -> None:
    ratio = Ratio(1024, 1024)
    assert [ratio(n) for n in (1000, 1001, 1001, 1003)] == [0, 1, 0, 2]


def test_ratio_resumes_exactly() -> None:
    whole, half = Ratio(300, 1024), Ratio(300, 1024)
    expected = [whole(n) for n in range(0, 200, 2)]
    begun = [half(n) for n in range(0, 90, 2)]
    again = Ratio(300, 1024)
    again.load_state_dict(half.state_dict())
    assert begun + [again(n) for n in range(90, 200, 2)] == expected


def test_ratio_does_not_catch_up_after_resume() -> None:
    before = Ratio(1024, 1024)
    for n in range(0, 100, 4):
        before(n)
    after = Ratio(1024, 1024)
    after.load_state_dict(before.state_dict())
    assert after(5000) == 4, "a second prefill earns as much as one step"
    assert after(5004) == 4
    assert after(10) == 0 and after(14) == 4, "a counter that went back earns nothing"


def test_ratio_refuses_an_update_without_rows() -> None:
    with pytest.raises(ValueError, match="positive"):
        Ratio(1, 0)


def test_stopwatch_splits_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    for _ in range(2):
        with watch.section("env"):
            now[0] += 1.0
    with pytest.raises(KeyError), watch.section("update"):
        now[0] += 5.0
        raise KeyError
    now[0] += 3.0
    assert watch.fractions() == pytest.approx({"env": 0.2, "update": 0.5, "other": 0.3})
    watch.reset()
    now[0] += 1.0
    assert watch.fractions() == {"other": 1.0}


def test_memory_counts_children_and_does_not_import_torch() -> None:
    here = clock.memory()
    assert 0.005 < here["memory/rss_gib"] < 100
    program = "b = bytearray(b'x' * 200_000_000); print('ready', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as child:
        child.stdout.readline()
        with_child = clock.memory()
        child.communicate(b"\n")
    assert with_child["memory/rss_gib"] - here["memory/rss_gib"] > 0.15
    program = (
        "import sys; from latentplan.runtime import clock; clock.memory(); "
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True)
    assert result.stdout.strip() == b"False"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="only Linux counts shared pages")
def test_mapped_files_are_counted_separately(tmp_path: Path) -> None:
    import numpy as np

    data = np.memmap(tmp_path / "ring.bin", np.uint8, "w+", shape=(100_000_000,))
    before = clock.memory()
    data[:] = 1
    after = clock.memory()
    assert after["memory/rss_gib"] - before["memory/rss_gib"] < 0.05
    assert after["memory/shared_gib"] - before["memory/shared_gib"] > 0.08


def test_disk_counts_allocated_blocks_and_not_file_lengths(tmp_path: Path) -> None:
    (tmp_path / "replay").mkdir()
    with open(tmp_path / "replay" / "hole.bin", "wb") as file:
        file.truncate(1_000_000_000)
    assert clock.disk(tmp_path)["memory/disk_gib"] < 0.001
    (tmp_path / "replay" / "full.bin").write_bytes(os.urandom(3_000_000))
    assert clock.disk(tmp_path)["memory/disk_gib"] * clock.GIB == pytest.approx(3e6, rel=0.05)
