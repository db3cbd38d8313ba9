"""Pictures of a world that can be read: what is shown is what was imagined.

How films are laid out is tested in ``test_film.py``; here it is what goes into them.
"""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from painter import SIZE, VECTOR_SPEC, PaintedEnv, make_painter, painted_batch
from PIL import Image

from latentplan.behavior.imagination import imagine
from latentplan.inspection import canvas, film, open_loop, plan_fan
from latentplan.inspection import dream_against_reality as reality
from latentplan.inspection import imagined_rollouts as dreams
from latentplan.inspection.latent_map import THUMBNAIL, latent_map
from latentplan.inspection.visualizations import CAPTIONS, exhibits
from latentplan.runs.logger import encode_gif, encode_png
from latentplan.types import Timestep

GRAY = 127  # of an error of zero


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the last film was made of."""
    kept = SimpleNamespace()
    whole = film.film

    def watched(rows, headers, charts=None, scale=2):
        kept.rows, kept.headers, kept.charts = rows, headers, charts
        return whole(rows, headers, charts, scale)

    for module in (film, dreams, open_loop, reality):
        monkeypatch.setattr(module, "film", watched)
    return kept


def lines(shown: SimpleNamespace, title: str) -> dict[str, np.ndarray]:
    return {line.name: line.values for line in shown.charts[title]}


def level(pictures: np.ndarray) -> np.ndarray:
    """The one gray level of each picture (..., h, w, 3)."""
    assert (pictures == pictures[..., :1, :1, :1]).all()
    return pictures[..., 0, 0, 0].astype(int)


def test_a_perfect_model_makes_no_error(shown: SimpleNamespace) -> None:
    batch = painted_batch(2, 7)
    movie = open_loop.show_open_loop(make_painter(), batch, 3)
    assert movie.shape[0] == 7 and movie.dtype == np.uint8
    np.testing.assert_array_equal(shown.rows["truth"], batch.obs["image"].numpy())
    np.testing.assert_array_equal(level(shown.rows["model"]), level(shown.rows["truth"]))
    assert (shown.rows["error"] == GRAY).all()
    assert [color == canvas.CONTEXT for _, color in shown.headers] == [True] * 3 + [False] * 4
    rewards = lines(shown, "reward")
    np.testing.assert_allclose(rewards["model"][:, 1:], rewards["true"][:, 1:], atol=1e-6)
    added = np.abs(np.diff(level(shown.rows["truth"]), axis=1)) / 255
    doubt = lines(shown, "uncertainty")["uncertainty"]
    assert np.isnan(doubt[:, :3]).all(), "what was seen was not predicted"
    np.testing.assert_allclose(doubt[:, 3:], added[:, 2:], atol=1e-6)


def test_the_model_is_on_its_own_after_the_context(shown: SimpleNamespace) -> None:
    batch = painted_batch(1, 6)
    batch.obs["image"][:, 4:] = 0  # what really happened then is something else
    open_loop.show_open_loop(make_painter(), batch, 3)
    error = level(shown.rows["error"])[0]
    assert (error[:4] == GRAY).all() and (error[4:] > GRAY).all()


def test_the_policy_is_followed_from_a_real_state(shown: SimpleNamespace) -> None:
    agent, batch = make_painter(), painted_batch(2, 4)
    with torch.no_grad():
        agent.actor.net.output.bias[0] = 0.3
    movie = dreams.show_policy(agent, batch, 5)
    assert movie.shape[0] == 6
    assert [words for words, _ in shown.headers] == ["real state"] + [
        f"imagined +{h}" for h in range(1, 6)
    ]
    seen = level(shown.rows["imagined"])
    np.testing.assert_array_equal(seen[:, 0], level(batch.obs["image"][:, -1].numpy()))
    start = dreams.last_state(agent, batch)
    expected = imagine(agent.world.step, dreams.mean_action(agent), start, 5).latent.deter[..., 0]
    np.testing.assert_array_equal(seen, (255 * expected.detach()).round().int().numpy())
    reward = lines(shown, "reward")["reward"]
    assert np.isnan(reward[:, 0]).all()
    np.testing.assert_allclose(255 * reward[:, 1:], seen[:, 1:], atol=1e-3)
    assert (lines(shown, "continue")["continue"][:, 1:] == 1).all()
    assert lines(shown, "value")["value"].shape == (2, 6)


def test_the_planner_is_shown_beside_the_policy(shown: SimpleNamespace) -> None:
    """Of sixteen candidates the planner takes the lighter ones: the world pays for light."""
    batch = painted_batch(3, 4)
    dreams.show_conservative(make_painter(candidates=16, imagine_rate=0.0), batch, 6)
    policy, planner = (level(shown.rows[name]) for name in ("policy", "planner"))
    np.testing.assert_array_equal(policy[:, 0], planner[:, 0])
    assert (planner[:, -1] > policy[:, -1]).all()
    mark = level(shown.rows["difference"])
    assert (mark[:, 0] == GRAY).all() and (mark[:, -1] > GRAY).all()
    sums = lines(shown, "sum of reward")
    assert (sums["planner"][:, -1] > sums["policy"][:, -1]).all() and (
        sums["policy"][:, 0] == 0
    ).all()
    with pytest.raises(ValueError, match="planner"):
        dreams.show_conservative(make_painter(candidates=1), batch, 6)


# --- the plan fan ---------------------------------------------------------------------------


SIDE = SIZE + 2 * canvas.BORDER
PITCH = plan_fan.NARROWEST + 2 * canvas.BORDER + canvas.GAP  # small pictures: numbers need that


def fan_tile(picture: np.ndarray, place: int, step: int) -> np.ndarray:
    """A state on the way of the candidate at this place, with its frame."""
    line = canvas.LINE_HEIGHT + canvas.GAP
    top = line + place * (line + SIDE + 2 * canvas.LINE_HEIGHT) + line
    return picture[top : top + SIDE, step * PITCH : step * PITCH + SIDE]


@pytest.mark.parametrize("optimism", [1.0, -1.0])
def test_the_chosen_candidate_is_framed_and_comes_first(optimism: float) -> None:
    agent = make_painter(candidates=4)
    state = dreams.last_state(agent, painted_batch(1, 3))
    torch.manual_seed(3)
    plan = agent.behavior.plan(state, optimism)
    picture = plan_fan.draw_fan(plan, plan_fan.decoded(agent, plan), optimism, "title")
    order = plan.score[0].argsort(descending=True).tolist()
    assert order[0] == int(plan.best)
    inside = slice(canvas.BORDER, -canvas.BORDER)
    for place, k in enumerate(order):
        for step in range(3):
            tile = fan_tile(picture, place, step)
            color = canvas.CHOSEN if place == 0 else canvas.DIM
            assert (tile[0] == color).all() and (tile[:, -1] == color).all()
            expected = round(255 * float(plan.candidates.latent.deter[0, k, step]))
            assert (tile[inside, inside] == expected).all()


def test_every_candidate_is_labelled_with_what_it_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    write = plan_fan.text
    monkeypatch.setattr(
        plan_fan,
        "text",
        lambda words, *size: said.extend(w for w, _ in words) or write(words, *size),
    )
    agent = make_painter(candidates=3)
    plan = agent.behavior.plan(dreams.last_state(agent, painted_batch(1, 3)), 1.0)
    plan_fan.draw_fan(plan, plan_fan.decoded(agent, plan), 1.0, "title")
    k = int(plan.best)
    names = ("score", "ret", "novelty")
    score, ret, novelty = (canvas.number(float(getattr(plan, x)[0, k])) for x in names)
    assert f"#1  score {score} = return {ret} +1 x uncertainty {novelty}" in said
    rewards = [f"r {canvas.number(float(x))}" for x in plan.candidates.reward[0, k]]
    doubts = [f"u {canvas.number(float(x))}" for x in plan.candidates.uncertainty[0, k]]
    assert set(rewards + doubts) <= set(said)


def test_of_many_candidates_the_best_are_shown() -> None:
    agent = make_painter(candidates=20)
    state = dreams.last_state(agent, painted_batch(1, 3))
    eight = plan_fan.show_plan_fan(make_painter(candidates=8), state)
    assert plan_fan.show_plan_fan(agent, state).shape[0] == eight.shape[0]


def test_one_candidate_is_a_strip_of_the_policy() -> None:
    agent = make_painter(candidates=1)
    shown = [x.name for x in exhibits(agent, painted_batch(2, 6), 3)]
    assert shown == ["open_loop", "imagined_policy", "plan_fan"]


# --- a dream against reality ----------------------------------------------------------------


def test_the_dreamed_actions_are_taken(shown: SimpleNamespace) -> None:
    agent = make_painter()
    with torch.no_grad():
        agent.actor.net.output.bias[0] = 0.3
    movie = reality.show_reality(agent, PaintedEnv(100), 3, 5)
    assert movie.shape[0] == 6
    real = level(shown.rows["reality"])
    assert (np.diff(real, axis=1) != 0).any(), "something happened"
    assert (shown.rows["error"] == GRAY).all(), "the model is perfect"
    assert np.abs(lines(shown, "distance")["distance"]).max() < 1e-6
    rewards = lines(shown, "reward")
    np.testing.assert_allclose(rewards["dream"], rewards["reality"], atol=1e-6)


def test_the_distance_grows_where_reality_leaves_the_dream(shown: SimpleNamespace) -> None:
    reality.show_reality(make_painter(), PaintedEnv(100, drift=4 / 255), 3, 5)
    distance = lines(shown, "distance")["distance"]
    np.testing.assert_allclose(distance, np.broadcast_to(4 / 255 * np.arange(6), (2, 6)), atol=1e-5)


def test_the_film_ends_with_the_episode(shown: SimpleNamespace) -> None:
    movie = reality.show_reality(make_painter(), PaintedEnv(6), 3, 50)
    assert movie.shape[0] == 3  # rows 3, 4 and 5


# --- all of them ----------------------------------------------------------------------------


def test_every_exhibit_has_a_caption_and_can_be_encoded() -> None:
    for exhibit in exhibits(make_painter(), painted_batch(4, 8), 3):
        assert exhibit.name in CAPTIONS and exhibit.frames.dtype == np.uint8
        if len(exhibit.frames) == 1:
            still = np.asarray(Image.open(io.BytesIO(encode_png(exhibit.frames[0]))))
            np.testing.assert_array_equal(still, exhibit.frames[0])
        else:
            gif = Image.open(io.BytesIO(encode_gif(exhibit.frames, 8)))
            assert 1 < gif.n_frames <= len(exhibit.frames)  # equal neighbors are one, for longer
            for there, t in ((0, 0), (gif.n_frames - 1, len(exhibit.frames) - 1)):
                gif.seek(there)
                error = np.abs(np.asarray(gif.convert("RGB")).astype(int) - exhibit.frames[t])
                assert error.mean() < 2, "but for the palette, the frame that went in"


def test_without_pictures_there_are_charts() -> None:
    names = []
    for exhibit in exhibits(make_painter(spec=VECTOR_SPEC), painted_batch(2, 6, VECTOR_SPEC), 3):
        names.append(exhibit.name)
        assert len(exhibit.frames) == 1 and (exhibit.frames != canvas.BACKGROUND).any()
    assert names == ["open_loop", "imagined_policy", "plan_fan", "planner_against_policy"]


def test_the_latent_map_has_returns_and_thumbnails() -> None:
    agent = make_painter()
    batch = painted_batch(2, 4)
    ends = Timestep(*batch[:4], torch.tensor([[False] * 3 + [True]] * 2))
    found = latent_map(agent, ends)
    assert found.features.shape == (8, 1) and found.thumbnails.shape == (8, 3, THUMBNAIL, THUMBNAIL)
    discount = agent.config.behavior.discount
    reward = batch.reward[0].tolist()
    expected = reward[1] + discount * (reward[2] + discount * reward[3])
    assert found.columns["return"][0] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        found.thumbnails[:, 0, 0, 0], batch.obs["image"].flatten(0, 1)[:, 0, 0, 0] / 255, atol=1e-6
    )
