from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest

from latentplan.runs import checkpoint, metrics_file
from latentplan.runs.logger import Logger
from latentplan.study.matrix import Job

ROWS = [{"step": 10 * i, "time": i + 0.5, "episode/eval_score": -1.0 * i} for i in range(1, 6)]
DAMAGED = {
    "not UTF-8": b'{"step": 1, "a\xff": 2}',
    "no JSON": b"{]}",
    "no object": b"[1, 2]",
    "number": b"3",
    "no step": b'{"time": 1}',
    "step of another type": b'{"step": "20"}',
    "step that is no number": b'{"step": null}',
    "step with a fraction": b'{"step": 20.5}',
    "switch as a step": b'{"step": true}',
    "negative step": b'{"step": -3}',
    "huge step": b'{"step": 1%s}' % (b"0" * 30),
    "text": b'{"step": 1, "loss": "low"}',
    "list": b'{"step": 1, "loss": [1]}',
    "object": b'{"step": 1, "loss": {"a": 1}}',
    "switch": b'{"step": 1, "loss": true}',
    "infinite": b'{"step": 1, "loss": 1e999}',
    "huge integer": b'{"step": 1, "loss": 1%s}' % (b"0" * 400),
    "many digits": b'{"step": 1, "loss": 1%s}' % (b"0" * 5000),
    "deep": b"[" * 100_000,
}


def content(rows: list[dict[str, float]] = ROWS) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_costs_only_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content(ROWS[:2]) + line + b"\n" + content(ROWS[2:]))
    for _ in range(2):
        metrics = metrics_file.read(path)
        assert metrics.rows == ROWS and metrics.damaged == (3,)
    assert b"".join(text.encode() for text in metrics.lines) == content()
    (warning,) = caplog.messages
    assert str(path) in warning and "line 3 is damaged" in warning


def test_values_that_were_not_finite_are_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": null, "b": NaN, "c": -Infinity}\n\n')
    metrics = metrics_file.read(path)
    assert metrics.rows == [{"step": 1, "a": None, "b": None, "c": None}] and not metrics.damaged


def test_a_last_line_that_is_being_written_is_left_out_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content() + b'{"step": 60, "ti')
    assert metrics_file.read(path).rows == ROWS and caplog.messages == []


def test_a_damaged_line_break_costs_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content().replace(b"}\n{", b"}\x8a{", 1))
    assert metrics_file.read(path).rows == ROWS


def test_any_flipped_bit_costs_at_most_its_own_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    rng, path = random.Random(0), tmp_path / "metrics.jsonl"
    for _ in range(300):
        damaged = bytearray(content())
        at = rng.randrange(len(damaged))
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        rows = metrics_file.read(path).rows
        assert sum(row in rows for row in ROWS) >= len(ROWS) - 1
        Logger(tmp_path, frame=30).close()
        assert all(row["step"] <= 30 for row in metrics_file.read(path).rows)


def test_a_study_counts_a_run_whose_last_row_is_damaged(tmp_path: Path) -> None:
    job = Job("dummy:count", "none", 1, tmp_path, (), 50)
    checkpoint.save(tmp_path / "checkpoint.pt", {"frames": 50})
    (tmp_path / "metrics.jsonl").write_bytes(content()[:-2] + b"\xff\n")
    assert job.progress() == (40, -4.0, True) and job.done()
    checkpoint.save(tmp_path / "checkpoint.pt", {"frames": 40})
    assert not job.done()
