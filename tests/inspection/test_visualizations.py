"""Visualizations of a world whose images show its state.

``test_film.py`` tests the layout of films. These tests check their content.
"""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from painter import SIZE, VECTOR_SPEC, PaintedEnv, make_painter, painted_batch
from PIL import Image
from tiny import DISCRETE, agent_config, random_batch

from latentplan.agent import Agent
from latentplan.behavior.imagination import imagine
from latentplan.config.loading import load
from latentplan.config.schema import PlanConfig
from latentplan.envs.simulator import Picture
from latentplan.inspection import (
    canvas,
    dream_against_reality,
    entries,
    film,
    imagined_rollouts,
    open_loop,
    plan_fan,
)
from latentplan.inspection.action_names import name_actions
from latentplan.inspection.latent_map import THUMBNAIL, latent_map
from latentplan.inspection.visualizations import CAPTIONS, visualizations
from latentplan.nn.distributions import symlog
from latentplan.runs import stamp
from latentplan.runs.video import encode_gif, encode_png
from latentplan.types import Timestep, UserError

GRAY = 127  # the gray level of an error of zero


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The rows, headers, charts and texts of the last film."""
    recorded = SimpleNamespace()
    make_film = film.make_film

    def record_and_make_film(rows, headers, charts=None, scale=2, texts=None):
        recorded.rows, recorded.headers, recorded.charts = rows, headers, charts
        recorded.texts = texts
        return make_film(rows, headers, charts, scale, texts)

    for module in (film, imagined_rollouts, open_loop, dream_against_reality):
        monkeypatch.setattr(module, "make_film", record_and_make_film)
    return recorded


def lines(content: SimpleNamespace, title: str) -> dict[str, np.ndarray]:
    """The values of the lines of a chart, by name."""
    return {line.name: line.values for line in content.charts[title]}


def level(images: np.ndarray) -> np.ndarray:
    """The gray level of each image (..., h, w, 3), which must have only one."""
    assert (images == images[..., :1, :1, :1]).all()
    return images[..., 0, 0, 0].astype(int)


def test_the_film_of_a_perfect_model_shows_no_error(content: SimpleNamespace) -> None:
    batch = painted_batch(2, 7)
    movie = open_loop.make_open_loop_film(make_painter(), batch, 3)
    assert movie.shape[0] == 7 and movie.dtype == np.uint8
    np.testing.assert_array_equal(content.rows["truth"], batch.obs["image"].numpy())
    np.testing.assert_array_equal(level(content.rows["model"]), level(content.rows["truth"]))
    assert (content.rows["error"] == GRAY).all()
    assert [color == canvas.CONTEXT for _, color in content.headers] == [True] * 3 + [False] * 4
    rewards = lines(content, "reward")
    np.testing.assert_allclose(rewards["model"][:, 1:], rewards["true"][:, 1:], atol=1e-6)
    added = np.abs(np.diff(level(content.rows["truth"]), axis=1)) / 255
    uncertainty = lines(content, "uncertainty")["uncertainty"]
    assert np.isnan(uncertainty[:, :3]).all(), "context rows are not predicted"
    np.testing.assert_allclose(uncertainty[:, 3:], added[:, 2:], atol=1e-6)


def test_a_film_of_vectors_compares_the_entries_that_vary_most(content: SimpleNamespace) -> None:
    batch = painted_batch(2, 7, VECTOR_SPEC)
    batch.is_terminal[1, 6] = True
    open_loop.make_open_loop_film(make_painter(spec=VECTOR_SPEC), batch, 3)
    entry = lines(content, "vector[0]")
    np.testing.assert_array_equal(entry["true"], batch.obs["vector"][..., 0])
    np.testing.assert_allclose(entry["model"], entry["true"], atol=1e-5)
    ends = lines(content, "continue")
    assert ends["true"][1, 6] == 0 and ends["true"].sum() == 13 and (ends["model"] == 1).all()


def test_films_name_the_discrete_action_that_led_to_each_frame(content: SimpleNamespace) -> None:
    config = dataclasses.replace(agent_config(), plan=PlanConfig(candidates=2))
    agent, (batch, _) = Agent(DISCRETE, config), random_batch(2, 5, DISCRETE)
    movie = open_loop.make_open_loop_film(agent, batch, 2)
    names = [name_actions(DISCRETE, row) for row in batch.prev_action]
    assert content.texts == {"action": names} and names[0][1].startswith("action ")
    silent = film.make_film({}, content.headers, content.charts)
    grown = movie.shape[1] - silent.shape[1]
    assert grown - film.TEXT_HEIGHT in (0, 1), "heights are even"
    imagined_rollouts.make_imagined_policy_film(agent, batch, 3)
    (first, *others), _ = content.texts["action"]
    assert first == "" and len(others) == 3 and all(x.startswith("action ") for x in others)
    imagined_rollouts.make_planner_against_policy_film(agent, batch, 3)
    assert list(content.texts) == ["policy", "planner"]


def test_the_entries_of_a_chart_are_those_that_vary_most() -> None:
    truth = np.zeros((2, 5, 9), np.float32)
    for entry, scale in ((1, 3.0), (4, 0.5), (5, 1e-3), (6, 40.0), (8, 0.2)):
        truth[..., entry] = scale * np.linspace(-1, 1, 5)
    charts = entries.entry_charts(truth, symlog(torch.from_numpy(truth)) * 0, "vector")
    assert list(charts) == ["vector[1]", "vector[4]", "vector[6]", "vector[8]"]
    true, model = charts["vector[6]"]
    np.testing.assert_array_equal(true.values, truth[..., 6])
    assert not model.values.any()


def test_the_model_receives_no_observations_after_the_context(content: SimpleNamespace) -> None:
    batch = painted_batch(1, 6)
    batch.obs["image"][:, 4:] = 0  # the model predicts other images here
    open_loop.make_open_loop_film(make_painter(), batch, 3)
    error = level(content.rows["error"])[0]
    assert (error[:4] == GRAY).all() and (error[4:] > GRAY).all()


def test_the_imagined_policy_starts_from_a_real_state(content: SimpleNamespace) -> None:
    agent, batch = make_painter(), painted_batch(2, 4)
    with torch.no_grad():
        agent.actor.net.output.bias[0] = 0.3
    movie = imagined_rollouts.make_imagined_policy_film(agent, batch, 5)
    assert movie.shape[0] == 6
    assert [header for header, _ in content.headers] == ["real state"] + [
        f"imagined +{h}" for h in range(1, 6)
    ]
    imagined = level(content.rows["imagined"])
    np.testing.assert_array_equal(imagined[:, 0], level(batch.obs["image"][:, -1].numpy()))
    start = imagined_rollouts.last_state(agent, batch)
    expected = imagine(
        agent.world.step, imagined_rollouts.mean_action(agent), start, 5
    ).latent.deter[..., 0]
    np.testing.assert_array_equal(imagined, (255 * expected.detach()).round().int().numpy())
    reward = lines(content, "reward")["reward"]
    assert np.isnan(reward[:, 0]).all()
    np.testing.assert_allclose(255 * reward[:, 1:], imagined[:, 1:], atol=1e-3)
    assert (lines(content, "continue")["continue"][:, 1:] == 1).all()
    assert lines(content, "value")["value"].shape == (2, 6)


def test_the_planner_is_compared_with_the_policy(content: SimpleNamespace) -> None:
    """The planner chooses lighter states than the policy, because the reward is the gray level."""
    batch = painted_batch(3, 4)
    imagined_rollouts.make_planner_against_policy_film(
        make_painter(candidates=16, imagine_rate=0.0), batch, 6
    )
    policy, planner = (level(content.rows[name]) for name in ("policy", "planner"))
    np.testing.assert_array_equal(policy[:, 0], planner[:, 0])
    assert (planner[:, -1] > policy[:, -1]).all()
    difference = level(content.rows["difference"])
    assert (difference[:, 0] == GRAY).all() and (difference[:, -1] > GRAY).all()
    sums = lines(content, "sum of reward")
    assert (sums["planner"][:, -1] > sums["policy"][:, -1]).all() and (
        sums["policy"][:, 0] == 0
    ).all()
    with pytest.raises(ValueError, match="planner"):
        imagined_rollouts.make_planner_against_policy_film(make_painter(candidates=1), batch, 6)


# --- the plan fan ---------------------------------------------------------------------------


SIDE = SIZE + 2 * canvas.BORDER
PITCH = plan_fan.MIN_COLUMN_WIDTH + 2 * canvas.BORDER + canvas.GAP  # wider than the images


def fan_tile(fan: np.ndarray, rank: int, step: int) -> np.ndarray:
    """The image of a predicted state, with its border, of the candidate with this rank."""
    line = stamp.LINE_HEIGHT + canvas.GAP
    top = line + rank * (line + SIDE + 2 * stamp.LINE_HEIGHT) + line
    return fan[top : top + SIDE, step * PITCH : step * PITCH + SIDE]


@pytest.mark.parametrize("optimism", [1.0, -1.0])
def test_the_chosen_candidate_has_a_yellow_frame_and_comes_first(optimism: float) -> None:
    agent = make_painter(candidates=4)
    state = imagined_rollouts.last_state(agent, painted_batch(1, 3))
    torch.manual_seed(3)
    plan = agent.behavior.plan(state, optimism)
    fan = plan_fan.draw_plan(plan, plan_fan.decode_plan(agent, plan), optimism, "title")
    order = plan.score[0].argsort(descending=True).tolist()
    assert order[0] == int(plan.best)
    inside = slice(canvas.BORDER, -canvas.BORDER)
    for rank, k in enumerate(order):
        for step in range(3):
            tile = fan_tile(fan, rank, step)
            color = canvas.CHOSEN if rank == 0 else canvas.DIM
            assert (tile[0] == color).all() and (tile[:, -1] == color).all()
            expected = round(255 * float(plan.candidates.latent.deter[0, k, step]))
            assert (tile[inside, inside] == expected).all()


def test_every_candidate_is_labeled_with_the_terms_of_its_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels: list[str] = []
    draw_text = plan_fan.draw_text
    monkeypatch.setattr(
        plan_fan,
        "draw_text",
        lambda lines, *size: labels.extend(x for x, _ in lines) or draw_text(lines, *size),
    )
    agent = make_painter(candidates=3)
    plan = agent.behavior.plan(imagined_rollouts.last_state(agent, painted_batch(1, 3)), 1.0)
    plan_fan.draw_plan(plan, plan_fan.decode_plan(agent, plan), 1.0, "title")
    k = int(plan.best)
    names = ("score", "ret", "novelty")
    score, ret, novelty = (canvas.format_number(float(getattr(plan, x)[0, k])) for x in names)
    assert f"#1  score {score} = return {ret} +1 x uncertainty {novelty}" in labels
    rewards = [f"r {canvas.format_number(float(x))}" for x in plan.candidates.reward[0, k]]
    uncertainties = [
        f"u {canvas.format_number(float(x))}" for x in plan.candidates.uncertainty[0, k]
    ]
    assert set(rewards + uncertainties) <= set(labels)


def test_only_the_best_eight_candidates_are_shown() -> None:
    agent = make_painter(candidates=20)
    state = imagined_rollouts.last_state(agent, painted_batch(1, 3))
    eight = plan_fan.make_plan_fan(make_painter(candidates=8), state)
    assert plan_fan.make_plan_fan(agent, state).shape[0] == eight.shape[0]


def test_a_run_without_a_planner_has_no_film_of_a_planner() -> None:
    agent = make_painter(candidates=1)
    names = [x.name for x in visualizations(agent, painted_batch(2, 6), 3)]
    assert names == ["open_loop", "imagined_policy", "plan_fan"]


# --- a dream against reality ----------------------------------------------------------------


def test_the_environment_takes_the_dreamed_actions(content: SimpleNamespace) -> None:
    agent = make_painter()
    with torch.no_grad():
        agent.actor.net.output.bias[0] = 0.3
    movie = dream_against_reality.make_dream_against_reality_film(agent, PaintedEnv(100), 3, 5)
    assert movie.shape[0] == 6
    real = level(content.rows["reality"])
    assert (np.diff(real, axis=1) != 0).any(), "the images change"
    assert (content.rows["error"] == GRAY).all(), "the model is perfect"
    assert np.abs(lines(content, "distance")["distance"]).max() < 1e-6
    rewards = lines(content, "reward")
    np.testing.assert_allclose(rewards["dream"], rewards["reality"], atol=1e-6)


@pytest.mark.parametrize("drawable", [True, False])
def test_a_dream_of_vectors_is_shown_beside_the_scene(
    content: SimpleNamespace, drawable: bool
) -> None:
    class VectorEnv(PaintedEnv):
        def _row(self, action: torch.Tensor, first: bool = False) -> Timestep:
            row = super()._row(action, first)
            return row._replace(obs={"vector": self.level.numpy()})

        def draw(self, i: int) -> Picture:
            if not drawable:
                raise UserError("no picture")
            return Picture(np.full((200, 300, 3), 255 * float(self.level[i]), np.uint8), 0.1)

    agent = make_painter(spec=VECTOR_SPEC)
    movie = dream_against_reality.make_dream_against_reality_film(
        agent, VectorEnv(100), 3, 5, draws=True
    )
    entry = lines(content, "vector[0]")
    np.testing.assert_allclose(entry["dream"], entry["reality"], atol=1e-5)
    assert len(movie) == (6 if drawable else 1)
    if drawable:
        scene = level(content.rows["reality"])
        np.testing.assert_allclose(scene, 255 * entry["reality"], atol=1)
        assert movie.shape[2] < 400, "TensorBoard would shrink it until its text is illegible"


@pytest.mark.parametrize("workers", [True, False])
@pytest.mark.parametrize("beside_training", [True, False])
def test_only_the_environments_of_training_keep_a_renderer_away(
    monkeypatch: pytest.MonkeyPatch, workers: bool, beside_training: bool
) -> None:
    """They could be disturbed by a renderer in their own process."""
    monkeypatch.setattr(dream_against_reality, "pick_renderer", lambda config, film: None)
    monkeypatch.setattr(
        dream_against_reality, "make_eval_env", lambda *args, film=False: SimpleNamespace(film=film)
    )
    config = load([], [f"env.workers={workers}", "task=cartpole_swingup", "obs=state"])
    env, draws = dream_against_reality.make_film_env(
        config, None, 1, 0, beside_training=beside_training
    )
    assert draws == env.film == (workers or not beside_training)


def test_the_distance_grows_with_the_difference_from_reality(content: SimpleNamespace) -> None:
    dream_against_reality.make_dream_against_reality_film(
        make_painter(), PaintedEnv(100, drift=4 / 255), 3, 5
    )
    distance = lines(content, "distance")["distance"]
    np.testing.assert_allclose(distance, np.broadcast_to(4 / 255 * np.arange(6), (2, 6)), atol=1e-5)


def test_the_film_ends_with_the_episode(content: SimpleNamespace) -> None:
    movie = dream_against_reality.make_dream_against_reality_film(
        make_painter(), PaintedEnv(6), 3, 50
    )
    assert movie.shape[0] == 3  # rows 3, 4 and 5


# --- all visualizations ---------------------------------------------------------------------


def test_every_visualization_has_a_caption_and_can_be_encoded() -> None:
    for visualization in visualizations(make_painter(), painted_batch(4, 8), 3):
        assert visualization.name in CAPTIONS and visualization.frames.dtype == np.uint8
        if len(visualization.frames) == 1:
            still = np.asarray(Image.open(io.BytesIO(encode_png(visualization.frames[0]))))
            np.testing.assert_array_equal(still, visualization.frames[0])
        else:
            gif = Image.open(io.BytesIO(encode_gif(visualization.frames, 8)))
            assert 1 < gif.n_frames <= len(visualization.frames)  # equal neighbors are merged
            for there, t in ((0, 0), (gif.n_frames - 1, len(visualization.frames) - 1)):
                gif.seek(there)
                error = np.abs(np.asarray(gif.convert("RGB")).astype(int) - visualization.frames[t])
                assert error.mean() < 2, "equal up to the palette"


def test_without_images_there_are_charts() -> None:
    names = []
    for visualization in visualizations(
        make_painter(spec=VECTOR_SPEC), painted_batch(2, 6, VECTOR_SPEC), 3
    ):
        names.append(visualization.name)
        assert len(visualization.frames) == 1 and (visualization.frames != stamp.BACKGROUND).any()
    assert names == ["open_loop", "imagined_policy", "plan_fan", "planner_against_policy"]


def test_the_latent_map_has_returns_and_thumbnails() -> None:
    agent = make_painter()
    batch = painted_batch(2, 4)
    ends = Timestep(*batch[:4], torch.tensor([[False] * 3 + [True]] * 2))
    result = latent_map(agent, ends)
    assert result.features.shape == (8, 1) and result.thumbnails.shape == (
        8,
        3,
        THUMBNAIL,
        THUMBNAIL,
    )
    discount = agent.config.behavior.discount
    reward = batch.reward[0].tolist()
    expected = reward[1] + discount * (reward[2] + discount * reward[3])
    assert result.columns["return"][0] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        result.thumbnails[:, 0, 0, 0], batch.obs["image"].flatten(0, 1)[:, 0, 0, 0] / 255, atol=1e-6
    )
