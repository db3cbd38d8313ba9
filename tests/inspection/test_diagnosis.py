"""Measures on a toy world whose answers are known, verdicts on given numbers, and the command."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VECTOR, agent_config, world_config
from torch import Tensor, nn

from latentplan.agent import Agent
from latentplan.cli.main import main
from latentplan.config.validation import schema_fields
from latentplan.inspection import behavior_quality, diagnosis
from latentplan.inspection.behavior_quality import compare_values, earned, held_out_returns
from latentplan.inspection.diagnosis import LOOK, OK, OUT
from latentplan.inspection.diagnosis_report import to_text
from latentplan.inspection.model_quality import (
    AHEAD,
    ROWS,
    measure_model,
    measure_reward,
    measure_uncertainty,
    unexplained,
    visit,
)
from latentplan.nn.action_distributions import ActionDist
from latentplan.nn.distributions import symlog
from latentplan.types import Latent, Prediction, StepNoise, Timestep

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Toy(nn.Module):
    """x' = x + drift * a, observed without noise. ``reward`` sees (x', a, a uniform draw)."""

    spec, feature_size = VECTOR, 3

    def __init__(self, drift: float = 1.0, reward: Reward = lambda x, a, luck: x[:, 0]):
        super().__init__()
        self.drift, self.reward = drift, reward

    def observe(self, rows: Timestep) -> tuple[Latent, None]:
        return self._latent(rows.obs["vector"]), None

    def features(self, latent: Latent) -> Tensor:
        return latent.deter

    def decode(self, latent: Latent) -> dict[str, Tensor]:
        return {"vector": symlog(latent.deter)}

    def outcome(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[..., 0], torch.ones_like(features[..., 0])

    def step_unmeasured(self, latent: Latent, action: Tensor, noise: StepNoise) -> Prediction:
        moved = self.drift * torch.nn.functional.pad(action.clamp(-1, 1), (0, 1))
        following = self._latent(latent.deter + moved)
        reward = self.reward(following.deter, action, noise.uniform[:, 0])
        return Prediction(following, reward, torch.ones(len(action)), None)

    def draw_noise(self, n: int, horizon: int, generator: object = None) -> StepNoise:
        return StepNoise(None, torch.rand(horizon, n, 1))

    def autocast(self) -> nullcontext:
        return nullcontext()

    def _latent(self, x: Tensor) -> Latent:
        return Latent(x, torch.zeros(*x.shape[:-1], 1, 1))


def toy_agent(world: Toy, **behavior: Any) -> Agent:
    """An untrained agent in a toy world: its mean action and its values are about 0."""
    torch.manual_seed(0)
    config = agent_config(world_config(members=4), **behavior)
    config = replace(config, plan=replace(config.plan, candidates=8, horizon=2))
    return Agent(VECTOR, config, world=world)


def walk(lengths: tuple[int, ...] = (12, 9), envs: int = 2) -> Timestep:
    """Rows (T, N) of random walks in the toy world, where the third entry never changes."""
    rng = np.random.default_rng(0)
    total = sum(lengths)
    first = np.zeros((total, envs), bool)
    first[np.cumsum((0, *lengths[:-1]))] = True
    action = rng.uniform(-1, 1, (total, envs, 2)).astype(np.float32)
    action[first] = 0
    x = np.zeros((total, envs, 3), np.float32)
    for t in range(total):
        begin = np.append(rng.normal(size=(envs, 2)), np.ones((envs, 1)), 1)
        x[t] = np.where(first[t][:, None], begin, x[t - 1] + np.pad(action[t], ((0, 0), (0, 1))))
    reward = np.where(first, 0, x[..., 0])
    return Timestep({"vector": x}, action, reward, first, np.zeros_like(first))


# --- world model ----------------------------------------------------------------------------


def test_unexplained_variance_is_0_for_the_truth_and_1_for_its_mean() -> None:
    truth = torch.randn(50, 3, 2)
    truth[:, 2] = 7.0  # this entry does not vary
    torch.testing.assert_close(unexplained(truth, truth)[:2], torch.zeros(2))
    torch.testing.assert_close(
        unexplained(truth.mean(0).expand(50, 3, 2), truth)[:2], torch.ones(2)
    )
    assert unexplained(truth, truth)[2].isnan()
    shifted = unexplained(truth + 1, truth)
    torch.testing.assert_close(shifted[0], 2 / truth[:, 0].var(0, correction=0).sum())


def test_chosen_rows_have_enough_rows_of_their_episode_before_them() -> None:
    visits = visit(toy_agent(Toy()), walk((12, 3, 9), envs=3))
    assert sorted(set(visits.time.tolist())) == [*range(AHEAD, 12), *range(15 + AHEAD, 24)]
    assert len(visits.env) == 3 * (12 - AHEAD + 9 - AHEAD)
    many = visit(toy_agent(Toy()), walk((ROWS + 50,)))
    assert len(many.env) == ROWS and set(many.env.tolist()) == {0, 1}
    assert not len(visit(toy_agent(Toy()), walk((AHEAD, AHEAD))).env)


def test_the_true_model_leaves_nothing_unexplained() -> None:
    agent, rows = toy_agent(Toy()), walk()
    visits = visit(agent, rows)
    model, reward = measure_model(agent, visits), measure_reward(agent, visits)
    for when in ("now", "ahead"):
        assert model[when] == pytest.approx({"vector[0]": 0, "vector[1]": 0}, abs=1e-6)
        assert reward[when] == pytest.approx(0, abs=1e-6)
    assert model["constant"] == ["vector[2]"] and reward["rewarded"] == 1


def test_a_model_that_ignores_actions_fails_ahead_only() -> None:
    agent = toy_agent(Toy(drift=0.0))
    visits = visit(agent, walk())
    model = measure_model(agent, visits)
    assert max(model["now"].values()) < 1e-6 < 0.1 < min(model["ahead"].values())
    # By hand: the prediction is the observation AHEAD decisions before.
    x = symlog(visits.rows.obs["vector"])[..., :2]
    now, before = (x[visits.env, visits.time - back] for back in (0, AHEAD))
    expected = (now - before).square().mean(0) / now.var(0, correction=0)
    assert list(model["ahead"].values()) == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_reward_that_was_never_seen_is_named() -> None:
    agent, rows = toy_agent(Toy()), walk()
    reward = measure_reward(agent, visit(agent, rows._replace(reward=np.zeros_like(rows.reward))))
    assert reward == {"now": None, "ahead": None, "rewarded": 0}
    verdict, sentence = diagnosis.judge_reward(reward)
    assert verdict == LOOK and sentence.startswith("No reward was seen")


def test_the_uncertainty_of_few_windows_or_one_member_is_left_out() -> None:
    agent = Agent(VECTOR, agent_config())
    assert "ask for more" in measure_uncertainty(agent, walk((20,)))["left_out"]
    many = measure_uncertainty(agent, walk((120,)))
    assert many["left_out"] is None and many["windows"] == 28
    assert all(-1 <= rho <= 1 for rho in many["rank_correlation"].values())
    alone = measure_uncertainty(Agent(VECTOR, agent_config(world_config(members=1))), walk((120,)))
    assert "single member" in alone["left_out"]


# --- behavior -------------------------------------------------------------------------------


def test_earned_returns_by_hand() -> None:
    """A terminal episode of rewards 1, 2, and one that is cut after the reward 4."""
    row = lambda *x: torch.tensor([x])  # noqa: E731
    first, terminal = row(1, 0, 0, 1, 0).bool(), row(0, 0, 1, 0, 0).bool()
    rows = Timestep({}, torch.zeros(1, 5, 1), row(0.0, 1.0, 2.0, 0.0, 4.0), first, terminal)
    returns, weight, telling = earned(rows, torch.full((1, 5), 10.0), 0.5)
    assert returns.tolist() == [[1 + 0.5 * 2, 2, 0, 4 + 0.5 * 10, 10]]
    assert weight.tolist() == [[0, 0, 0, 0.5, 1]]
    assert telling.tolist() == [[True, True, False, True, False]]


def test_rows_whose_return_is_mostly_the_critics_own_value_tell_nothing() -> None:
    rows = visit(toy_agent(Toy()), walk((41,), 1)).rows
    for discount, last in ((0.9, 34), (0.999, 20)):  # 0.9^7 <= 0.5; or the first half
        telling = earned(rows, torch.zeros(1, 41), discount)[2]
        assert telling[0].tolist() == [t < last for t in range(41)], discount


def test_a_critic_that_is_the_return_has_correlation_1_and_bias_0() -> None:
    returns = torch.randn(100)
    same, shifted = compare_values(returns, returns, 2.0), compare_values(returns + 3, returns, 2.0)
    assert same["correlation"] == pytest.approx(1) and same["bias"] == 0
    assert shifted["correlation"] == pytest.approx(1) and shifted["bias"] == pytest.approx(1.5)
    assert compare_values(-returns, returns, 2.0)["correlation"] == pytest.approx(-1)
    assert compare_values(torch.zeros(100), returns, 2.0)["correlation"] is None


def ended(rows: Timestep) -> Timestep:
    """The rows of a single episode that ends for good, so that no value stands for the rest."""
    terminal = np.zeros_like(rows.is_first)
    terminal[-1] = True
    return rows._replace(is_terminal=terminal)


@pytest.mark.parametrize(("critics", "bias", "spread"), [(1, 1.0, None), (2, 0.0, 1.0)])
def test_the_slow_critics_are_compared_with_what_was_earned(
    critics: int, bias: float, spread: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The critics know the return: the first one is 1 above it, the second one 1 below it."""
    agent = toy_agent(Toy(), critics=critics)
    visits = visit(agent, ended(walk((40,))))
    true, _, _ = earned(visits.rows, torch.zeros(2, 40), agent.config.behavior.discount)
    values = true + torch.tensor([1.0, -1.0])[:critics, None, None]
    monkeypatch.setattr(agent.critic, "slow_values", lambda features: values)
    critic = behavior_quality.measure_critic(agent, visits)
    assert critic["correlation"] == pytest.approx(1) and critic["own"] == 0
    assert critic["bias"] == pytest.approx(bias, abs=1e-5)
    assert critic["spread"] == (None if spread is None else pytest.approx(spread))


def test_entropy_is_earned_where_the_critic_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = toy_agent(Toy(), entropy=0.5)
    visits = visit(agent, ended(walk((40,))))
    plain = behavior_quality.measure_critic(agent, visits)
    monkeypatch.setattr(agent.learner.objective, "soft", True, raising=False)
    soft = behavior_quality.measure_critic(agent, visits)
    bonus = 0.5 * agent.behavior.policy(visits.latent).entropy().detach()
    paid = torch.nn.functional.pad(bonus[:, :-1], (1, 0))
    only = earned(visits.rows._replace(reward=paid), torch.zeros(2, 40), 1 - 1 / 333)[0]
    extra = float(only[:, :-1].mean())
    assert soft["return"] - plain["return"] == pytest.approx(extra, rel=1e-4) and extra > 1


def test_a_known_better_action_gains_what_it_earns_in_the_same_draws() -> None:
    """The reward is the first action's entry plus luck, which both actions share."""
    world = Toy(reward=lambda x, a, luck: a[:, 0] + 100 * luck)
    policy = lambda latent: ActionDist(torch.zeros(len(latent.deter), 4), 0.1, 1.0)  # noqa: E731
    start = world._latent(torch.zeros(7, 3))
    better, own = held_out_returns(
        world.step_unmeasured,
        world.draw_noise,
        policy,
        lambda latent: latent.deter[:, 0],
        start,
        (torch.full((7, 2), 0.5), torch.zeros(7, 2)),
        horizon=3,
        discount=0.5,
        draws=4,
        sample=True,
    )
    # The reward of the first step, and the value of the last state, which is 0.5 further.
    torch.testing.assert_close(
        better - own, torch.full((7,), 0.5 + 0.5**3 * 0.5), atol=1e-3, rtol=0
    )


def luck_of_action(x: Tensor, a: Tensor, luck: Tensor) -> Tensor:
    """A reward that looks random in every draw, for every action, and has no mean."""
    return torch.sin(1e4 * (a[:, 0] + luck))


@pytest.mark.parametrize("search", ["samples", "cross_entropy"])
@pytest.mark.parametrize("lucky", [True, False])
def test_only_a_planner_that_knows_better_gains_in_fresh_draws(search: str, lucky: bool) -> None:
    reward = luck_of_action if lucky else lambda x, a, luck: a[:, 0]
    world = Toy(reward=reward)
    world.step_expected_unmeasured = lambda latent, action, noise=None: world.step_unmeasured(
        latent, action, noise or StepNoise(None, torch.rand(len(action), 1))
    )
    agent = toy_agent(world)
    agent.behavior.config = replace(
        agent.config, plan=replace(agent.config.plan, search=search, rounds=2, elites=3)
    )
    agent.config = agent.behavior.config
    planner = behavior_quality.measure_planner(agent, visit(agent, walk((60,))))
    assert planner["states"] == 64 and planner["in_sample_gain"] > 0.3
    if lucky:
        assert abs(planner["gain"]) < 3 * planner["gain_error"] and planner["gain_error"] < 0.1
    else:
        assert planner["gain"] > 0.3 and planner["gain"] > 10 * planner["gain_error"]


def test_the_width_of_the_policy() -> None:
    agent = toy_agent(Toy(), std_min=0.1, std_max=0.6)
    actor = behavior_quality.measure_actor(agent, visit(agent, walk()))
    assert actor["width"] == pytest.approx(float(torch.sigmoid(torch.tensor(2.0))), abs=0.01)
    assert actor["std"] == pytest.approx(0.1 + 0.5 * actor["width"])
    dist = ActionDist.from_mean_std(torch.zeros(1), torch.tensor([actor["std"]]))
    assert actor["entropy"] == pytest.approx(float(dist.entropy()), abs=0.01)


# --- verdicts -------------------------------------------------------------------------------

MODEL = {"now": {"a": 0.1, "b": 0.2}, "ahead": {"a": 0.3, "b": 0.2}, "constant": []}
REWARD = {"now": 0.1, "ahead": 0.2, "rewarded": 0.5}
CRITIC = {
    **{"correlation": 0.9, "bias": 0.1, "value": 3.0, "return": 2.0, "own": 0.2},
    **{"spread": None, "return_scale": 2.0},
}
ACTOR = {"std": 0.3, "width": 0.2, "entropy": 0.1}
PLANNER = {"gain": 0.2, "gain_error": 0.01, "in_sample_gain": 0.3, "states": 64, "trained": True}
RANKS = {"left_out": None, "windows": 20, "rank_correlation": {"1": 0.5, "5": 0.4}, "used": True}
LUCK = PLANNER | {"gain": 0.001}
EVEN = {"mean": [10.0, 12.0], "sample": [10.0, 11.0], "planner": [10.0, 12.0]}
WORSE, BETTER = EVEN | {"planner": [5.0, 7.0]}, EVEN | {"planner": [15.0, 17.0]}
CASES: list[tuple[str, tuple[Any, ...], str, str]] = [
    ("model", (MODEL,), OK, "`a` (unexplained variance 0.30)"),
    ("model", (MODEL | {"now": {"a": 0.6, "b": 0.9}},), LOOK, "2 of 2 observed entries (unex"),
    ("model", (MODEL | {"ahead": {"a": 0.6, "b": 0.2}},), LOOK, "1 of 2 observed entries 5 dec"),
    ("model", ({"now": {}, "ahead": {}, "constant": ["a"]},), LOOK, "No entry"),
    ("reward", (REWARD,), OK, "0.20 after 5"),
    ("reward", (REWARD | {"ahead": 0.7},), LOOK, "50.0% of the rows"),
    ("reward", (REWARD | {"now": None, "ahead": None},), LOOK, "always the same"),
    ("reward", ({"now": None, "ahead": None, "rewarded": 0.0},), LOOK, "No reward was seen"),
    ("critic", (CRITIC,), OK, "correlation 0.90, bias +0.10"),
    ("critic", (CRITIC | {"correlation": None},), LOOK, "constant"),
    ("critic", (CRITIC | {"correlation": 0.2},), LOOK, "0.20"),
    ("critic", (CRITIC | {"bias": 0.8},), LOOK, "promises too much (by 0.80"),
    ("critic", (CRITIC | {"bias": -0.8},), LOOK, "expects too little (by 0.80"),
    ("critic", (CRITIC | {"spread": 0.4},), LOOK, "disagree by 0.40"),
    ("actor", (ACTOR, EVEN), OK, "score 11"),
    ("actor", (ACTOR, EVEN | {"mean": [5.0, 6.0]}), LOOK, "worse than its samples"),
    ("actor", (ACTOR | {"width": 0.9}, EVEN), LOOK, "prefers no action"),
    ("planner", (PLANNER, EVEN), OK, "1.00 times as much"),
    ("planner", (PLANNER, WORSE), LOOK, "in the model only"),
    ("planner", (LUCK, WORSE), LOOK, "luck in the model"),
    ("planner", (PLANNER, BETTER), LOOK, "lags behind"),
    ("planner", (LUCK, EVEN), LOOK, "adds nothing"),
    ("planner", (LUCK | {"trained": False}, EVEN), OK, "trained without a planner"),
    ("planner", (PLANNER, {k: [-2.0, -3.0] for k in EVEN}), OK, "policy's -2.5; gain"),
    ("planner", (PLANNER | {"gain": None}, EVEN), LOOK, "gain in the model nan"),
    ("uncertainty", (RANKS,), OK, "0.50 after 1 decision, 0.40 after 5 decisions"),
    ("uncertainty", (RANKS | {"rank_correlation": {"1": None, "5": 0.4}},), LOOK, "unknown after"),
    ("uncertainty", (RANKS | {"rank_correlation": {"1": 0.1, "5": 0.4}},), LOOK, "noise"),
    (
        "uncertainty",
        (RANKS | {"rank_correlation": {"1": 0.1, "5": 0.4}, "used": False},),
        OK,
        "nothing in this run uses it",
    ),
    ("uncertainty", ({"left_out": "There is one member.", "used": True},), OUT, "There is one"),
]


@pytest.mark.parametrize(("part", "arguments", "verdict", "words"), CASES)
def test_verdicts(part: str, arguments: tuple[Any, ...], verdict: str, words: str) -> None:
    found, sentence = getattr(diagnosis, f"judge_{part}")(*arguments)
    assert found == verdict and words in sentence
    assert sentence.endswith(".") and not re.search(r"[.!?] [A-Z]", sentence)  # one sentence
    keys = {key for key, _ in schema_fields()}
    named = re.findall(r"\b(?:train|world|behavior|plan|distill)\.[a-z_]+", sentence)
    assert set(named) <= keys


def test_a_difference_of_scores_must_be_large_and_no_chance() -> None:
    assert diagnosis.exceeds([11, 12, 13], [10, 11, 12])
    assert not diagnosis.exceeds([10, 11, 12], [11, 12, 13])
    assert not diagnosis.exceeds([1001, 1002], [1000, 1001])  # it is small
    assert not diagnosis.exceeds([30, 0, 10], [0, 20, 10])  # it may be chance


# --- the command ----------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def test_a_run_is_diagnosed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    before = content(folder)
    capsys.readouterr()
    assert main(["diagnose", str(folder), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder) and max(map(len, lines[1:])) <= 100
    parts = ["model", "reward", "critic", "actor", "planner", "uncertainty"]
    assert [x.split()[0] for x in lines[4:] if not x.startswith(" ")] == parts

    written = (folder / "diagnosis.json").read_bytes()
    assert content(folder) == before | {"diagnosis.json": written}
    assert main(["diagnose", str(folder), "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(written)  # and the same numbers came out twice
    assert {"run", "task", "frames", "scores", "verdicts", *parts} <= set(report)
    assert list(report["verdicts"]) == parts
    assert {x["verdict"] for x in report["verdicts"].values()} <= {OK, LOOK, OUT}
    assert set(report["model"]["ahead"]) == {"image", "vector[0]", "vector[1]"}
    assert report["critic"]["correlation"] is not None and report["reward"]["rewarded"] == 1
    assert report["planner"]["trained"] is False and report["candidates"] == 4
    assert report["verdicts"]["uncertainty"]["verdict"] == OUT  # episodes of 17 rows
    assert [len(report["scores"][mode]["returns"]) for mode in ("mean", "sample", "planner")] == [
        *(4, 4, 4)
    ]
    assert to_text(report).splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere"], "nowhere is not a run folder"), (["nowhere", "--episodes", "0"], "at least 1")],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and "Traceback" not in captured.err
    assert captured.err.count("\n") == 1 and not (tmp_path / "nowhere").exists()
