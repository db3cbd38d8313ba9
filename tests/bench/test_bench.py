from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BENCH_OVERRIDES, BOTH, agent_config, random_batch, world_config

from latentplan.agent import Agent
from latentplan.behavior.behavior import Behavior
from latentplan.behavior.planner import Plan
from latentplan.bench import loop, planning, report, storage, updates
from latentplan.bench.parts import FULL, Part, UpdateParts
from latentplan.cli import main as cli
from latentplan.config.loading import load
from latentplan.types import Latent, UserError

PARTS = ["encoder", "observe", "decoder", "heads", "imagination", "actor-critic", "optimizer"]


def tiny_parts(gradient: str, uncertainty: str = "jsd") -> tuple[Agent, UpdateParts]:
    torch.manual_seed(0)
    config = agent_config(world_config(uncertainty=uncertainty), gradient=gradient)
    agent = Agent(BOTH, config)
    return agent, UpdateParts(agent, *random_batch(3, 4, BOTH))


def trained_by(agent: Agent, part: Part) -> set[str]:
    """The names of the weights that get a gradient from the part."""
    part.prepare()
    part.run()
    return {name for name, p in agent.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["pathwise", "reinforce"])
def test_every_weight_gets_gradients_only_from_its_own_parts(gradient: str) -> None:
    agent, parts = tiny_parts(gradient, uncertainty="probes")
    trained = {
        name: trained_by(agent, part)
        for name, part in parts.parts().items()
        if name not in ("optimizer", FULL)
    }
    roots = {name: {".".join(key.split(".")[:2]) for key in keys} for name, keys in trained.items()}
    assert roots["encoder"] == {"world.encoder"}
    assert roots["observe"] == {"world.rssm"}
    assert roots["decoder"] == {"world.decoder"}
    assert roots["heads"] == {"world.rssm", "world.reward", "world.cont", "world.probes"}
    assert roots["imagination"] == ({"actor.net"} if gradient == "pathwise" else set())
    assert roots["actor-critic"] == {"actor.net", "critic.net"}
    learned = {name for name, p in agent.named_parameters() if p.requires_grad}
    assert set.union(*trained.values()) == learned


def test_timed_updates_do_not_compute_statistics_of_images() -> None:
    """Only the first updates of a training compute them."""
    agent, parts = tiny_parts("reinforce")
    mean = agent.world.image_normalizers["image"].mean.clone()
    parts.full()
    assert torch.equal(agent.world.image_normalizers["image"].mean, mean)


def test_actor_and_critic_are_timed_without_imagination(monkeypatch: pytest.MonkeyPatch) -> None:
    _, parts = tiny_parts("reinforce")
    monkeypatch.setattr("latentplan.behavior.behavior.imagine", None)
    parts.actor_critic()
    with pytest.raises(TypeError):
        parts.imagination()


def test_only_the_optimizer_and_the_full_update_change_weights() -> None:
    agent, parts = tiny_parts("pathwise")
    for name, part in parts.parts().items():
        before = [p.detach().clone() for p in agent.parameters()]
        part.prepare()
        part.run()
        moved = any(not torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True))
        assert moved == (name in ("optimizer", FULL)), name


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows (starts times candidates) of every plan that is made."""
    rows = []
    original = Behavior.plan

    def plan(self: Behavior, latent: Latent, *arguments: Any, **options: Any) -> Plan:
        rows.append(len(latent.deter) * self.config.plan.candidates)
        return original(self, latent, *arguments, **options)

    monkeypatch.setattr(Behavior, "plan", plan)
    return rows


def counted(
    planned: list[int], counts: list[dict[str, int]]
) -> Callable[..., dict[str, list[float]]]:
    """A replacement for ``time_parts`` that runs every part once and counts its planned rows."""

    def count(parts: Mapping[str, Part], *_: object) -> dict[str, list[float]]:
        rows = {}
        for name, part in parts.items():
            planned.clear()
            part.run()
            rows[name] = sum(planned)
        planned.clear()
        counts.append(rows)
        return {name: [1.0 + x] for name, x in rows.items()}

    return count


def test_the_command_prints_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    flags = ["--size", "cpu", "--repeats", "2", "--seconds", "0.1", "--json", str(path)]
    assert cli.main(["bench", *flags, *BENCH_OVERRIDES]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*PARTS, "sum of parts", "full update", "frames/s"])
    (result,) = json.loads(path.read_text())
    assert list(result["parts"]) == PARTS
    for row in [*result["parts"].values(), result["full"]]:
        assert 0 < row["min"] <= row["median"] <= row["max"]
    assert result["sum_of_parts"] == pytest.approx(
        sum(row["median"] for row in result["parts"].values())
    )
    assert result["environment"]["frames_per_second"] > 0
    assert len(result["storage"]) == 5
    for name, row in result["storage"].items():
        assert name in text
        assert row["ratio"] == row["checked"]["median"] / row["plain"]["median"] > 0


def test_only_the_checked_steps_of_storage_compute_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    agent = Agent(BOTH, agent_config(world_config()))
    summed: list[object] = []
    monkeypatch.setattr(zlib, "crc32", lambda *values: summed.append(values) or 0)
    for way, expected in ((storage.CHECKED, True), (storage.PLAIN, False)):
        with ExitStack() as stack:
            steps = storage.steps(tmp_path / str(expected), agent, BOTH, way, stack)
            for name, step in steps.items():
                step.prepare()
                summed.clear()
                step.run()
                assert bool(summed) == (expected and name != "draw a batch"), name


def test_results_are_compared_with_an_earlier_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    flags = ["--size", "cpu", "--repeats", "1", "--seconds", "0.05"]
    assert cli.main(["bench", *flags, "--json", str(path), *BENCH_OVERRIDES]) == 0
    capsys.readouterr()
    results = json.loads(path.read_text())
    twice = [{**x, "full": {"median": x["full"]["median"] / 2}} for x in results]
    assert "full update" in report.compare(results, twice) and "2.00" in report.compare(
        results, twice
    )
    assert "no result of the same name" in report.compare(results, [])
    for load_before, busy in ((0.1, False), (1.9, True)):
        text = report.describe([{**x, "load_before": load_before} for x in results])
        assert ("busy before this began (load 1.9)" in text) == busy
    path.write_text("[1]")
    assert cli.main(["bench", *flags, "--against", str(path), *BENCH_OVERRIDES]) == 2
    assert str(path) in capsys.readouterr().err


def test_the_training_loop_is_timed() -> None:
    overrides = ["size=cpu", *BENCH_OVERRIDES, "train.ratio=2", "train.threads=1", "device=cpu"]
    cost = loop.loop_cost(load(overrides=overrides), 4.0)
    assert cost["frames_per_second"] > 0 and cost["updates_per_second"] > 0
    assert 0 < cost["shares"]["update"] < 1 and sum(cost["shares"].values()) < 1.1
    assert "whole loop" in loop.describe_loop(cost)
    with pytest.raises(UserError, match="too short"):
        loop.loop_cost(load(overrides=overrides), 0.001)


def test_ablations_are_compared_with_the_first_one(
    planned: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["dreamer", "coplanner_faithful"]
    more = [*BENCH_OVERRIDES, "behavior.horizon=8", "train.threads=1"]
    flags = ["--size", "cpu", "--repeats", "3", *more, "--ablations", *names]
    assert cli.main(["bench", *flags]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split()[0] == "dreamer" and first.endswith("x 1.00")
    assert second.split()[0] == names[1] and float(second.split()[-1]) > 0
    planned.clear()
    counts: list[dict[str, int]] = []
    monkeypatch.setattr(updates, "time_parts", counted(planned, counts))
    assert cli.main(["bench", *flags]) == 0
    assert counts[0]["dreamer"] == 0 < counts[0][names[1]]  # each has its own configuration
    second = capsys.readouterr().out.splitlines()[2]
    assert second.endswith(f"x {1 + counts[0][names[1]]:.2f}")
    wrong = (["nothing"], ["dreamer", "--repeats", "0"], ["dreamer", "--json", "x.json"])
    for items in wrong:
        assert cli.main(["bench", "--size", "cpu", "--ablations", *items]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_planning_is_compared_with_the_same_update_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "ACTIONS", 5)
    flags = ["--size", "cpu", "--repeats", "1", "--seconds", "0.05", "--planning"]
    assert cli.main(["bench", *flags, *BENCH_OVERRIDES]) == 0
    text = capsys.readouterr().out
    assert "update, faithful" in text and "action, planner" in text and "x 1.00" in text


def test_the_faithful_form_plans_at_every_step(
    planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[dict[str, int]] = []
    monkeypatch.setattr(planning, "time_parts", counted(planned, counts))
    monkeypatch.setattr(planning, "ACTIONS", 5)
    config = load(overrides=["size=cpu", *BENCH_OVERRIDES, "behavior.starts_fraction=1"])
    planning.planning_cost(config, BOTH, torch.device("cpu"), 1)
    for rows in counts:
        assert rows["none"] == 0 < rows["as configured"] < rows["faithful"]
        # 6 starts, 2 steps and 4 candidates.
        assert rows["faithful"] == 6 * 2 * 4
    assert len(planned) == 5 + 10  # the actions of the planner, with warm-ups


@pytest.mark.parametrize(
    ("items", "message"),
    [(["--size", "huge"], "huge"), (["nope=1"], "nope"), (["--repeats", "0"], "at least 1")],
)
def test_wrong_arguments_print_one_sentence(
    items: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *items]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        report.write_json(tmp_path / "missing" / "bench.json", [])
