"""Images and films as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from films import decode_gif, moving_film

from latentplan.runs import video
from latentplan.runs.stamp import BACKGROUND, stamp, text_width
from latentplan.runs.video import encode_gif, tagged, write_video
from latentplan.types import UserError


def test_a_gif_of_many_colors_is_accurate_and_small() -> None:
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([x * 3, y * 3, np.full_like(x, 90)], -1).astype(np.uint8)
    film = np.stack([np.roll(smooth, 2 * t, 1) for t in range(60)])
    gif = encode_gif(film, 15)
    frames, durations = decode_gif(gif)
    assert frames.shape == film.shape and set(durations) == {70}
    assert np.abs(frames.astype(int) - film).mean() < 6
    assert len(gif) < film.size / 3


def test_repeated_frames_keep_their_duration() -> None:
    film = np.repeat(moving_film(3), 5, axis=0)
    frames, durations = decode_gif(encode_gif(film, 10))
    shown = np.concatenate(
        [np.repeat(f[None], d // 100, 0) for f, d in zip(frames, durations, strict=True)]
    )
    np.testing.assert_array_equal(shown, film)


def test_long_gifs_skip_frames_and_keep_their_duration() -> None:
    film = moving_film(1001)
    frames, durations = decode_gif(encode_gif(film, 20))
    np.testing.assert_array_equal(frames, film[::5])
    assert sum(durations) == pytest.approx(1001 * 1000 / 20, rel=0.01)
    assert len(frames) <= video.MAX_GIF_FRAMES


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 3, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
)
def test_a_gif_of_other_arrays_is_an_error(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\(T, H, W, 3\) uint8"):
        encode_gif(frames, 15)


def test_video_file_with_ffmpeg(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    film = moving_film(12, height=65, width=43)
    path = write_video(tmp_path / "out" / "eval.mp4", film, 10)
    assert path == tmp_path / "out" / "eval.mp4"
    reader = ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert meta["size"] == (44, 66) and meta["fps"] == 10
    frames = [np.frombuffer(frame, np.uint8).reshape(66, 44, 3) for frame in reader]
    assert len(frames) == 12
    assert np.abs(np.stack(frames)[:, :65, :43].astype(int) - film).mean() < 10


def test_video_file_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    path = write_video(tmp_path / "eval.mp4", moving_film(5), 10)
    assert path == tmp_path / "eval.gif"
    np.testing.assert_array_equal(decode_gif(path.read_bytes())[0], moving_film(5))


def test_video_file_when_ffmpeg_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/such/ffmpeg")
    assert write_video(tmp_path / "eval.mp4", moving_film(5), 10) == tmp_path / "eval.gif"
    assert [path.name for path in tmp_path.iterdir()] == ["eval.gif"]


@pytest.mark.parametrize("lists_encoders", [True, False])
def test_video_file_when_ffmpeg_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists_encoders: bool
) -> None:
    """ffmpeg reads all frames and fails without an error message.

    An existing older video must not be taken for its output.
    """
    real = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    listing = f'case "$*" in *-encoders*) exec "{real}" "$@";; esac\n' if lists_encoders else ""
    failing = tmp_path / "ffmpeg"
    failing.write_text(f"#!/bin/sh\n{listing}cat > /dev/null\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(failing))
    (tmp_path / "eval.mp4").write_bytes(b"older")
    assert write_video(tmp_path / "eval.mp4", moving_film(5), 10) == tmp_path / "eval.gif"
    assert (tmp_path / "eval.mp4").read_bytes() == b"older"
    assert {path.name for path in tmp_path.iterdir()} == {"ffmpeg", "eval.mp4", "eval.gif"}


def test_video_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/eval.gif cannot be written"):
        write_video(tmp_path / "file" / "eval.mp4", moving_film(5), 10)


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("film.gif", "film.gif"),
        ("film.GIF", "film.GIF"),
        ("walker.seed1", "walker.seed1.gif"),
        ("v1.2.mp4", "v1.2.gif"),
        ("film.avi", "film.avi.gif"),
    ],
)
def test_the_name_of_a_film_keeps_its_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, written: str
) -> None:
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    assert write_video(tmp_path / typed, moving_film(2), 10) == tmp_path / written
    assert (tmp_path / written).exists()


def test_a_tag_stands_before_the_suffix() -> None:
    assert tagged(Path("a/v1.2"), "mean") == Path("a/v1.2-mean")
    assert tagged(Path("a/v1.mp4"), "mean") == Path("a/v1-mean.mp4")


def test_films_of_more_frames_than_viewers_show_stay_in_real_time(tmp_path: Path) -> None:
    frames, durations = decode_gif(encode_gif(moving_film(100), 100))
    assert len(frames) == 50 and sum(durations) == 1000
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = write_video(tmp_path / "eval.mp4", list(moving_film(100, 64, 64)), 100)
    meta = next(ffmpeg.read_frames(str(path)))
    assert (meta["fps"], meta["duration"]) == (50, pytest.approx(1.0, abs=0.05))


@pytest.mark.parametrize("width", [16, 600])
def test_a_stamp_leaves_the_film_as_it_is(width: int) -> None:
    film = np.full((3, 20, width, 3), 200, np.uint8)
    stamped = stamp(film, "walker", 1200000, "planner")
    assert (stamped[:, -20:, :width] == 200).all() and len(stamped) == 3
    title = stamped[:, :-20]
    assert (title == title[:1]).all() and (title != BACKGROUND).any()
    assert stamped.shape[2] == max(width, text_width("frame 1,200,000"))
    assert not np.array_equal(title, stamp(film, "walker", 1200001, "planner")[:, :-20])
