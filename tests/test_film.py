from __future__ import annotations

import numpy as np
import pytest

from latentplan.inspection import film
from latentplan.inspection.film import open_loop_film, strip

B, T, SIZE, SCALE = 2, 6, 16, 2
TILE = SIZE * SCALE


def _sequences(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (B, T, SIZE, SIZE, 3)).astype(np.uint8)


def _tile(movie: np.ndarray, t: int, row: int, column: int) -> np.ndarray:
    """One picture of the film, with its border."""
    pitch = TILE + 2 * film.BORDER + film.GAP
    top = film.HEADER_HEIGHT + film.GAP + row * pitch
    left = film.LABEL_WIDTH + film.GAP + column * pitch
    side = TILE + 2 * film.BORDER
    return movie[t, top : top + side, left : left + side]


def _picture(movie: np.ndarray, t: int, row: int, column: int) -> np.ndarray:
    """One picture at its own size."""
    inside = slice(film.BORDER, -film.BORDER)
    return _tile(movie, t, row, column)[inside, inside][::SCALE, ::SCALE]


def test_every_picture_is_in_its_place() -> None:
    truth, model = _sequences(0), _sequences(1)
    movie = open_loop_film(truth, model, context=2)
    assert movie.dtype == np.uint8 and movie.shape[0] == T and movie.shape[3] == 3
    for t in range(T):
        for b in range(B):
            np.testing.assert_array_equal(_picture(movie, t, 0, b), truth[b, t])
            np.testing.assert_array_equal(_picture(movie, t, 1, b), model[b, t])
            error = (model[b, t].astype(float) - truth[b, t]) / 2 + 127.5
            assert np.abs(_picture(movie, t, 2, b) - error).max() <= 0.5


def test_pixels_are_enlarged_whole() -> None:
    movie = open_loop_film(_sequences(), _sequences(), context=2)
    inside = slice(film.BORDER, -film.BORDER)
    enlarged = _tile(movie, 0, 0, 1)[inside, inside]
    np.testing.assert_array_equal(enlarged[::2, ::2], enlarged[1::2, 1::2])


@pytest.mark.parametrize("context", [0, 2, T])
def test_borders_tell_context_from_imagined(context: int) -> None:
    movie = open_loop_film(_sequences(), _sequences(), context=context)
    for t in range(T):
        color = film.CONTEXT if t < context else film.IMAGINED
        for row in range(3):
            for b in range(B):
                tile = _tile(movie, t, row, b)
                sides = (tile[:2], tile[-2:], tile[:, :2], tile[:, -2:])
                assert all((side == color).all() for side in sides)


def test_no_error_is_gray_and_its_sign_shows() -> None:
    truth = np.full((1, 1, SIZE, SIZE, 3), 100, np.uint8)
    for value, shown in [(100, 127), (0, 77), (200, 177)]:
        movie = open_loop_film(truth, np.full_like(truth, value), context=0)
        assert (_picture(movie, 0, 2, 0) == shown).all()
    assert film.difference(np.uint8([255, 0]), np.uint8([0, 255])).tolist() == [0, 255]


def test_floats_are_shown_like_bytes_and_clipped() -> None:
    truth, model = _sequences(0), _sequences(1)
    expected = open_loop_film(truth, model, context=2)
    floats = model.astype(np.float32) / 255
    np.testing.assert_array_equal(open_loop_film(truth, floats, context=2), expected)
    wild = np.array([-3.0, 0.0, 1.0, 7.0, np.nan]).reshape(1, 5, 1, 1, 1) * np.ones((1, 5, 8, 8, 3))
    movie = film._as_uint8(wild)
    assert movie[0, :, 0, 0, 0].tolist() == [0, 0, 255, 255, 255]


def test_labels_and_headers_are_drawn() -> None:
    movie = open_loop_film(_sequences(), _sequences(), context=2)
    labels = movie[:, :, : film.LABEL_WIDTH]
    assert (labels == labels[0]).all(), "labels stand still"
    pitch = TILE + 2 * film.BORDER + film.GAP
    rows = [labels[0, film.HEADER_HEIGHT + r * pitch :][:pitch] for r in range(3)]
    assert all((row == film.TEXT).all(-1).any() for row in rows)
    assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[1], rows[2])
    headers = movie[:, : film.HEADER_HEIGHT, film.LABEL_WIDTH :]
    assert len({header.tobytes() for header in headers}) == T, "each tells its own time"


def test_sides_are_even_and_any_shape_fits() -> None:
    for shape in [(1, 2, 9, 7, 3), (3, 2, 8, 24, 3)]:
        truth = np.zeros(shape, np.uint8)
        for scale in (1, 3):
            movie = open_loop_film(truth, truth, context=1, scale=scale)
            assert movie.shape[1] % 2 == 0 and movie.shape[2] % 2 == 0


def test_strip_lays_frames_side_by_side() -> None:
    movie = open_loop_film(_sequences(), _sequences(1), context=2)
    still = strip(movie, every=2)
    width, pictures = movie.shape[2], movie.shape[2] - film.LABEL_WIDTH
    assert still.shape == (movie.shape[1], width + 2 * pictures, 3)
    np.testing.assert_array_equal(still[:, :width], movie[0])
    np.testing.assert_array_equal(still[:, -pictures:], movie[4][:, film.LABEL_WIDTH :])


def test_other_arrays_are_refused() -> None:
    truth = _sequences()
    with pytest.raises(ValueError, match="differ in shape"):
        open_loop_film(truth, truth[:, 1:], context=2)
    with pytest.raises(ValueError, match="truth must be"):
        open_loop_film(truth / 255, truth, context=2)
    with pytest.raises(ValueError, match="prediction must be"):
        open_loop_film(truth, truth.astype(np.int64), context=2)
