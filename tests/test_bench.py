from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import BOTH, agent_config, random_batch, world_config

from latentplan import bench, bench_planning, cli
from latentplan.agent import Agent
from latentplan.config import load
from latentplan.inspection.cost import FULL, Part, UpdateParts
from latentplan.types import UserError

TINY = [
    *("task=dummy:pixels", "env.image_size=16", "env.workers=false", "train.precision=float32"),
    *("train.batch=2", "train.length=3", "behavior.horizon=2", "behavior.units=8"),
    *("behavior.bins=41", "world.bins=41", "world.deter=16", "world.stoch=3", "world.classes=4"),
    *("world.hidden=8", "world.units=8", "world.depth=2", "world.members=3"),
    "world.member_hidden=8",
]
PARTS = ["encoder", "observe", "decoder", "heads", "imagination", "actor-critic", "optimizer"]


def tiny_parts(gradient: str, uncertainty: str = "jsd") -> tuple[Agent, UpdateParts]:
    torch.manual_seed(0)
    config = agent_config(world_config(uncertainty=uncertainty), gradient=gradient)
    agent = Agent(BOTH, config)
    return agent, UpdateParts(agent, *random_batch(3, 4, BOTH))


def touched(agent: Agent, part: Part) -> set[str]:
    """The weights that get a gradient when the part runs."""
    part.prepare()
    part.run()
    return {name for name, p in agent.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["pathwise", "reinforce"])
def test_every_weight_is_learned_in_exactly_the_parts_that_own_it(gradient: str) -> None:
    agent, parts = tiny_parts(gradient, uncertainty="probes")
    seen = {
        name: touched(agent, part)
        for name, part in parts.parts().items()
        if name not in ("optimizer", FULL)
    }
    roots = {name: {".".join(key.split(".")[:2]) for key in keys} for name, keys in seen.items()}
    assert roots["encoder"] == {"world.encoder"}
    assert roots["observe"] == {"world.rssm"}
    assert roots["decoder"] == {"world.decoder"}
    assert roots["heads"] == {"world.rssm", "world.reward", "world.cont", "world.probes"}
    assert roots["imagination"] == ({"actor.net"} if gradient == "pathwise" else set())
    assert roots["actor-critic"] == {"actor.net", "critic.net"}
    learned = {name for name, p in agent.named_parameters() if p.requires_grad}
    assert set.union(*seen.values()) == learned


def test_actor_and_critic_are_timed_without_imagination(monkeypatch: pytest.MonkeyPatch) -> None:
    _, parts = tiny_parts("reinforce")
    monkeypatch.setattr("latentplan.behavior.behavior.imagine", None)
    parts.actor_critic()
    with pytest.raises(TypeError):
        parts.imagination()


def test_only_the_optimizer_and_the_whole_move_the_weights() -> None:
    agent, parts = tiny_parts("pathwise")
    for name, part in parts.parts().items():
        before = [p.detach().clone() for p in agent.parameters()]
        part.prepare()
        part.run()
        moved = any(not torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True))
        assert moved == (name in ("optimizer", FULL)), name


def test_the_command_prints_every_part_and_the_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    flags = ["--peer", "small", "--repeats", "2", "--seconds", "0.1", "--json", str(path)]
    assert cli.main(["bench", *flags, *TINY]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*PARTS, "sum of parts", "full update", "frames/s"])
    assert "NOT measured here" in text and "estimate" in text
    (result,) = json.loads(path.read_text())
    assert list(result["parts"]) == PARTS
    for row in [*result["parts"].values(), result["full"]]:
        assert 0 < row["min"] <= row["median"] <= row["max"]
    assert result["sum_of_parts"] == pytest.approx(
        sum(row["median"] for row in result["parts"].values())
    )
    assert result["peer"]["ratio"] == pytest.approx(result["full"]["median"] / 2.4)
    assert result["peer"]["measured_here"] is False
    assert result["environment"]["frames_per_second"] > 0


def test_planning_is_timed_beside_the_same_update_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_planning, "ACTIONS", 5)
    flags = ["--size", "cpu", "--repeats", "1", "--seconds", "0.05", "--planning"]
    assert cli.main(["bench", *flags, *TINY]) == 0
    text = capsys.readouterr().out
    assert "update, faithful" in text and "action, planner" in text and "x 1.00" in text


def test_sizes_have_no_peer() -> None:
    (result,) = bench.bench(size="cpu", overrides=TINY, repeats=1, env_seconds=0.05)
    assert "peer" not in result and "NOT measured" not in bench.describe([result])


def test_the_peers_widths_are_theirs() -> None:
    for key, deter, stoch, depth, units in (
        ("small", 128, 16, 16, 128),
        ("large", 512, 32, 32, 512),
    ):
        config = load(overrides=bench.PEERS[key].overrides)
        world = config.world
        assert (world.deter, world.stoch, world.classes) == (deter, stoch, stoch)
        assert (world.depth, world.units, world.hidden) == (depth, units, units)
        assert (config.train.batch, config.train.length, config.behavior.horizon) == (16, 64, 15)
        assert config.env.image_size == 64 and config.obs == "pixels"
        # All the work of a peer's update, nothing left out.
        assert world.decode_fraction == config.behavior.starts_fraction == 1.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"repeats": 0}, "repeats"), ({"size": "huge"}, "huge"), ({"overrides": ["nope=1"]}, "nope")],
)
def test_mistakes_get_a_sentence(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.bench(**kwargs)


def test_results_that_cannot_be_written_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        bench.write_json(tmp_path / "missing" / "bench.json", [])
