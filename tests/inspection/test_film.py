from __future__ import annotations

import numpy as np
import pytest

from latentplan.inspection import canvas, film
from latentplan.inspection.canvas import Line, draw_chart, format_number, value_range
from latentplan.inspection.film import label_width, make_comparison_film, open_loop_headers
from latentplan.runs import stamp

B, T, SIZE, SCALE = 2, 6, 16, 2
TILE = SIZE * SCALE + 2 * canvas.BORDER
PITCH = TILE + canvas.GAP


def _sequences(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (B, T, SIZE, SIZE, 3)).astype(np.uint8)


def _film(truth: np.ndarray, model: np.ndarray, context: int = 2, **more) -> np.ndarray:
    return make_comparison_film(truth, model, open_loop_headers(context, truth.shape[1]), **more)


LEFT = label_width(["truth", "model", "error"], {})


def _tile(movie: np.ndarray, t: int, row: int, column: int, left: int = LEFT) -> np.ndarray:
    """One image of the film, with its border."""
    top = film.HEADER_HEIGHT + canvas.GAP + row * PITCH
    left = left + canvas.GAP + column * PITCH
    return movie[t, top : top + TILE, left : left + TILE]


def _image(movie: np.ndarray, t: int, row: int, column: int) -> np.ndarray:
    """One image of the film in its original size, without its border."""
    inside = slice(canvas.BORDER, -canvas.BORDER)
    return _tile(movie, t, row, column)[inside, inside][::SCALE, ::SCALE]


def test_every_image_is_in_its_row_and_column() -> None:
    truth, model = _sequences(0), _sequences(1)
    movie = _film(truth, model)
    assert movie.dtype == np.uint8 and movie.shape[0] == T and movie.shape[3] == 3
    for t in range(T):
        for b in range(B):
            np.testing.assert_array_equal(_image(movie, t, 0, b), truth[b, t])
            np.testing.assert_array_equal(_image(movie, t, 1, b), model[b, t])
            error = (model[b, t].astype(float) - truth[b, t]) / 2 + 127.5
            assert np.abs(_image(movie, t, 2, b) - error).max() <= 0.5


def test_every_pixel_becomes_a_square() -> None:
    inside = slice(canvas.BORDER, -canvas.BORDER)
    enlarged = _tile(_film(_sequences(), _sequences()), 0, 0, 1)[inside, inside]
    np.testing.assert_array_equal(enlarged[::2, ::2], enlarged[1::2, 1::2])


@pytest.mark.parametrize("context", [0, 2, T])
def test_borders_distinguish_context_from_imagined_frames(context: int) -> None:
    movie = _film(_sequences(), _sequences(), context)
    for t in range(T):
        color = canvas.CONTEXT if t < context else canvas.IMAGINED
        for row in range(3):
            for b in range(B):
                tile = _tile(movie, t, row, b)
                sides = (tile[:2], tile[-2:], tile[:, :2], tile[:, -2:])
                assert all((side == color).all() for side in sides)


def test_an_error_of_zero_is_gray_and_others_show_their_sign() -> None:
    truth = np.full((1, 1, SIZE, SIZE, 3), 100, np.uint8)
    for value, gray in [(100, 127), (0, 77), (200, 177)]:
        movie = _film(truth, np.full_like(truth, value), 0)
        assert (_image(movie, 0, 2, 0) == gray).all()
    assert canvas.difference(np.uint8([255, 0]), np.uint8([0, 255])).tolist() == [0, 255]


def test_floats_are_clipped_and_shown_as_uint8() -> None:
    truth, model = _sequences(0), _sequences(1)
    floats = model.astype(np.float32) / 255
    np.testing.assert_array_equal(_film(truth, floats), _film(truth, model))
    unclipped = np.array([-3.0, 0.0, 1.0, 7.0, np.nan]).reshape(1, 5, 1, 1, 1) * np.ones(
        (1, 5, 8, 8, 3)
    )
    assert canvas.as_uint8(unclipped)[0, :, 0, 0, 0].tolist() == [0, 0, 255, 255, 255]


def test_labels_and_headers_are_drawn() -> None:
    movie = _film(_sequences(), _sequences())
    labels = movie[:, :, :LEFT]
    assert (labels == labels[0]).all(), "labels do not change"
    rows = [labels[0, film.HEADER_HEIGHT + r * PITCH :][:PITCH] for r in range(3)]
    assert all((row == stamp.TEXT).all(-1).any() for row in rows)
    assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[1], rows[2])
    headers = movie[:, : film.HEADER_HEIGHT, LEFT:]
    assert len({header.tobytes() for header in headers}) == T, "every frame has its own header"


def test_height_and_width_are_even_for_images_of_any_shape() -> None:
    for shape in [(1, 2, 9, 7, 3), (3, 2, 8, 24, 3)]:
        truth = np.zeros(shape, np.uint8)
        lines = {"reward": [Line("reward", np.zeros(shape[:2]), stamp.TEXT)]}
        for more in ({"scale": 1}, {"scale": 3}, {"charts": lines}):
            movie = _film(truth, truth, 1, **more)
            assert movie.shape[1] % 2 == 0 and movie.shape[2] % 2 == 0


def test_one_row_of_one_sequence_is_laid_out_as_part_of_a_larger_film() -> None:
    frames, headers = _sequences()[:1], open_loop_headers(2, T)
    small = film.make_film({"model": frames}, headers, scale=SCALE)
    large = film.make_film({"model": frames, "error": frames}, headers, scale=SCALE)
    size = (small.shape[1] - 1, small.shape[2] - 1)  # without the padding to even sizes
    np.testing.assert_array_equal(*(movie[:, : size[0], : size[1]] for movie in (small, large)))


def test_arrays_of_another_shape_or_dtype_are_an_error() -> None:
    truth = _sequences()
    with pytest.raises(ValueError, match="differ in shape"):
        _film(truth, truth[:, 1:])
    with pytest.raises(ValueError, match="truth must be"):
        _film(truth / 255, truth)
    with pytest.raises(ValueError, match="images must be"):
        _film(truth, truth.astype(np.int64))


# --- charts ---------------------------------------------------------------------------------


def _heights(image: np.ndarray, color: stamp.Color) -> dict[int, float]:
    """The mean row of the pixels in ``color``, by column."""
    rows, columns = np.nonzero((image == color).all(-1))
    return {int(x): float(rows[columns == x].mean()) for x in np.unique(columns)}


def test_a_curve_is_drawn_at_its_values() -> None:
    values = np.array([0.0, 1.0, 0.5])
    heights = _heights(draw_chart([Line("x", values, (1, 2, 3))], 60, 40, 0.0, 1.0), (1, 2, 3))
    low, high, middle = (heights[round(x)] for x in canvas.x_positions(3, 60))
    assert low > 33 and high < 6 and abs(middle - 20) < 3
    empty = draw_chart([Line("x", np.full(3, np.nan), (1, 2, 3))], 60, 40, 0.0, 1.0)
    assert not _heights(empty, (1, 2, 3))


def test_missing_values_leave_a_gap() -> None:
    values = np.array([np.nan, np.nan, 0.5, 0.5, np.nan, 0.5])
    drawn = _heights(draw_chart([Line("x", values, (1, 2, 3))], 103, 40, 0.0, 1.0), (1, 2, 3))
    x = canvas.x_positions(6, 103)
    assert min(drawn) >= x[2] - 2 and not any(x[3] + 3 < c < x[5] - 3 for c in drawn)
    assert max(drawn) >= x[5] - 1, "a single point is drawn as a dot"


def test_ranges_include_all_values_and_are_never_empty() -> None:
    line = Line("x", np.array([np.nan, 2.0, -1.0]), stamp.TEXT)
    assert value_range([line]) == (-1.0, 2.0)
    assert value_range([line._replace(included=(5.0,))]) == (-1.0, 5.0)
    assert value_range([line._replace(values=np.ones(3))]) == (0.5, 1.5), "never empty"
    assert value_range([line._replace(values=np.full(2, np.nan))]) == (0.0, 1.0)
    assert [format_number(x) for x in (0.0, 1234.5, 0.5, 0.00123)] == [
        "0",
        "1.23e+03",
        "0.5",
        "1.2e-3",
    ]


def test_a_mark_moves_over_unchanged_charts() -> None:
    truth = _sequences()
    values = np.linspace(0, 1, B * T).reshape(B, T)
    lines = {"reward": [Line("true", values, stamp.TEXT), Line("model", values, canvas.SECOND)]}
    movie = _film(truth, truth, charts=lines)
    below = movie[:, film.HEADER_HEIGHT + 3 * PITCH + canvas.GAP :]
    assert below.shape[1] >= film.CHART_HEIGHT - 1
    left = label_width(["truth", "model", "error"], lines) + canvas.GAP
    for t, x in enumerate(np.rint(canvas.x_positions(T, TILE)).astype(int)):
        for b in range(B):
            column = below[t, : film.CHART_HEIGHT - canvas.GAP, left + b * PITCH + x]
            assert (column == stamp.TEXT).all()
    assert (below[:, :, :left] == below[0, :, :left]).all()


def test_a_film_without_images_shows_charts() -> None:
    lines = {"reward": [Line("reward", np.zeros((3, T)), stamp.TEXT)]}
    movie = film.make_film({}, open_loop_headers(2, T), lines)
    assert movie.shape[0] == T and movie.shape[2] >= 3 * film.PICTURE_WIDTH
