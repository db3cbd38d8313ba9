from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from films import decode_gif, moving_film
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentplan.runs import logger
from latentplan.runs.logger import Logger
from latentplan.types import UserError


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_write_logs_means_and_clears_them(tmp_path: Path) -> None:
    log = Logger(tmp_path)
    log.add({"train/loss/image": torch.tensor(2.0, requires_grad=True), "episode/score": 10})
    log.add({"train/loss/image": torch.tensor(4.0, dtype=torch.bfloat16)})
    row = log.write(1000, now={"fps/fps": 50.0})
    expected = {"train/loss/image": 3.0, "episode/score": 10.0, "fps/fps": 50.0}
    assert row == {"step": 1000, "time": row["time"], **expected}
    assert log.write(2000).keys() == {"step", "time"}
    assert _lines(tmp_path)[0] == row, "a row must be in the file as soon as it is written"
    log.close()
    events = _events(tmp_path)
    for tag, value in expected.items():
        ((step, logged),) = [(event.step, event.value) for event in events.Scalars(tag)]
        assert (step, logged) == (1000, pytest.approx(value))


def test_tensors_are_not_read_before_write(tmp_path: Path) -> None:
    log = Logger(tmp_path)
    loss = torch.zeros(())
    log.add({"loss": loss})
    loss += 5.0  # has an effect on `write` only if `add` did not convert the tensor to a number
    assert log.write(1)["loss"] == 5.0


def test_lines_are_strict_json(tmp_path: Path) -> None:
    log = Logger(tmp_path)
    log.add({"bad": torch.tensor(math.nan), "worse": math.inf, "good": 1.0})
    row = log.write(1)
    assert math.isnan(row["bad"]) and row["worse"] == math.inf
    (line,) = _lines(tmp_path)
    assert (line["bad"], line["worse"], line["good"]) == (None, None, 1.0)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_resuming_drops_rows_after_the_checkpoint(tmp_path: Path) -> None:
    log = Logger(tmp_path)
    for frame in (1000, 2000, 3000):
        log.write(frame, now={"score": float(frame)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1500, "time": 9')  # an incomplete line, as after a crash
    log = Logger(tmp_path, frame=2000)
    assert [line["step"] for line in _lines(tmp_path)] == [1000, 2000]
    log.write(2500, now={"score": -1.0})
    log.close()
    assert [line["step"] for line in _lines(tmp_path)] == [1000, 2000, 2500]
    scores = [(event.step, event.value) for event in _events(tmp_path).Scalars("score")]
    assert scores == [(1000, 1000.0), (2000, 2000.0), (2500, -1.0)]


def test_a_torn_last_line_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 5.0}')
    Logger(tmp_path, frame=1).write(2)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]


def test_time_continues_over_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    log = Logger(tmp_path)
    now[0] += 30
    assert log.write(1000)["time"] == 30
    now[0] += 10
    assert log.write(2000)["time"] == 40
    now[0] = 7.0  # the monotonic clock starts again when the machine is rebooted
    log = Logger(tmp_path, frame=1000)
    now[0] += 5
    assert log.write(1500)["time"] == 45, "the time of dropped rows must count"
    assert Logger(tmp_path, frame=0).write(10)["time"] == 0, "a new run must start at zero"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_gives_a_short_error(tmp_path: Path) -> None:
    log = Logger(tmp_path)
    log._file.close()
    log._file = full = open("/dev/full", "w")  # noqa: SIM115  (closing it fails too)
    with pytest.raises(UserError, match=r"Metrics cannot be written.*No space left"):
        log.write(1)
    with pytest.raises(OSError):
        full.close()


def test_a_video_is_logged_to_tensorboard_and_to_a_file(tmp_path: Path) -> None:
    log = Logger(tmp_path)
    film = moving_film(20)
    log.video("eval/video", film, 3000, fps=10)
    log.text("config", "task: walker", 0)
    log.close()
    content = (tmp_path / "videos" / "eval-video-3000.gif").read_bytes()
    (event,) = _events(tmp_path).Images("eval/video")
    assert (event.step, event.width, event.height) == (3000, 10, 12)
    assert event.encoded_image_string == content
    frames, durations = decode_gif(content)
    np.testing.assert_array_equal(frames, film)
    assert durations == [100] * 20
    assert _events(tmp_path).Tags()["tensors"] == ["config/text_summary"]
