"""A new run begins with the weights of another one, where they fit."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOTH, VECTOR, WORLD, agent_config, perturb, run_config, world_config

from latentplan.agent import Agent
from latentplan.runs import checkpoint, initial_weights, weights
from latentplan.training.session import train
from latentplan.types import EnvSpec, UserError

QUIET = ("log.inspect_every=0", "eval.every=0", "steps=128")


def trained(spec: EnvSpec = VECTOR, **world: Any) -> Agent:
    """An agent whose weights and statistics are not those of a fresh one."""
    agent = Agent(spec, agent_config(world_config(**world)))
    perturb([*agent.parameters()], 0.1)
    for normalizer in agent.world.vector_normalizers.values():
        normalizer.fit(torch.randn(4, 5, 3) * 7)
    for normalizer in agent.world.image_normalizers.values():
        normalizer.fit(torch.randint(256, (4, 16, 16, 3)).byte())
    agent.return_scale.update(torch.randn(9) * 100)
    agent.world.count_update()
    return agent


def begin(there: Agent, here: Agent) -> tuple[dict[str, torch.Tensor], set[str], set[str]]:
    """Copy weights. Returns the former state, the copied names, and the layers kept fresh."""
    before = {name: x.clone() for name, x in here.state_dict().items()}
    copied = weights.copy_fitting(here, there.state_dict(), Path("other.pt"))
    after, other = here.state_dict(), there.state_dict()
    names = {name for name in after if name in other and torch.equal(after[name], other[name])}
    for name in after.keys() - names:
        assert torch.equal(after[name], before[name]), name
    return before, names, {text.partition(" ")[0] for text in copied.fresh}


def test_an_agent_of_the_same_sizes_takes_everything_but_the_scales() -> None:
    torch.manual_seed(0)
    there, here = trained(BOTH), Agent(BOTH, agent_config())
    before, names, fresh = begin(there, here)
    assert fresh == set()
    left = set(before) - names
    assert left and all(name.startswith(weights.OF_THE_TASK) for name in left)
    assert {"critic.slow_net.output.weight", "world.rssm.updates"} <= names
    assert {
        "world.vector_normalizers.vector.mean",
        "world.image_normalizers.image.spread",
    } <= names
    assert float(here.return_scale.count) == 0


@pytest.mark.parametrize(
    ("spec", "world", "expected"),
    [
        (BOTH._replace(action_dim=5), {}, {"world.rssm.action_in", "actor.net.output"}),
        (
            EnvSpec({**BOTH.obs, "vector": ((4,), "float32")}, 2, 2),
            {},
            {
                "world.vector_normalizers.vector",
                "world.encoder.mlp.hidden.0",
                "world.decoder.mlp.output",
            },
        ),
        (
            EnvSpec({**BOTH.obs, "image": ((32, 32, 3), "uint8")}, 2, 2),
            {},
            {
                "world.image_normalizers.image",
                "world.decoder.convs.image.input",
                "world.rssm.posterior_embed",
            },
        ),
        (BOTH, {"units": 9}, None),
        (VECTOR, {}, {"world.rssm.posterior_embed"}),
    ],
    ids=["action", "vector", "image", "widths", "fewer"],
)
def test_layers_of_other_sizes_stay_fresh(
    spec: EnvSpec, world: dict[str, Any], expected: set[str] | None
) -> None:
    torch.manual_seed(0)
    there = trained(BOTH)
    here = Agent(spec, agent_config(world_config(**world)))
    _, names, fresh = begin(there, here)
    own = {name for name in here.state_dict() if not name.startswith(weights.OF_THE_TASK)}
    assert {name.rpartition(".")[0] for name in own - names} <= fresh
    if expected is not None:
        assert expected <= fresh
    assert "critic.net.hidden.0.weight" in names and "world.rssm.deter_in.weight" in names
    assert not any(name.rpartition(".")[0] in fresh for name in names)


def test_a_layer_is_copied_as_a_whole() -> None:
    """The bias of the actor's output would fit if only the inputs differed."""
    there = trained(VECTOR)
    config = agent_config()
    here = Agent(VECTOR, replace(config, behavior=replace(config.behavior, units=9)))
    _, names, fresh = begin(there, here)
    assert "actor.net.output" in fresh and "actor.net.output.bias" not in names


def test_nothing_that_fits_is_an_error() -> None:
    there = trained(VECTOR)
    sizes = dict.fromkeys(("deter", "hidden", "units", "member_hidden"), 20)
    config = agent_config(replace(WORLD, **sizes, bins=21), units=20, bins=21)
    here = Agent(EnvSpec({"vector": ((5,), "float32")}, 4, 2), config)
    before = {name: x.clone() for name, x in here.state_dict().items()}
    with pytest.raises(UserError, match=r"other\.pt has no layer that fits this agent"):
        weights.copy_fitting(here, there.state_dict(), Path("other.pt"))
    assert all(torch.equal(x, before[name]) for name, x in here.state_dict().items())


def test_numbers_that_are_not_finite_are_refused() -> None:
    there = trained(VECTOR)
    there.actor.net.output.bias.data[0] = float("nan")
    with pytest.raises(UserError, match=r"not finite in actor\.net\.output\.bias"):
        weights.copy_fitting(Agent(VECTOR, agent_config()), there.state_dict(), Path("other.pt"))


def test_an_encoder_without_statistics_gets_none() -> None:
    state = {
        name: x for name, x in trained(VECTOR).state_dict().items() if "_normalizers." not in name
    }
    here = Agent(VECTOR, agent_config())
    weights.copy_fitting(here, state, Path("other.pt"))
    assert int(here.world.vector_normalizers["vector"].batches) == -1


def test_a_run_begins_with_the_weights_of_another_and_resumes_without_it(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other run has images too, so some layers do not fit. It is only read."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text("env: {module: missing.py}\n")  # not read
    before = {x: x.read_bytes() for x in other.rglob("*") if x.is_file()}
    items = (*QUIET, f"train.init_from={other}", "seed=3", "train.ratio=0.001")
    with caplog.at_level(logging.INFO, "latentplan"):
        folder = train(run_config(tmp_path / "run", *items))
    assert "layers begin with the weights of" in caplog.text and "of frame 256" in caplog.text
    (fresh,) = (x for x in caplog.messages if x.startswith("these layers do not fit"))
    assert "world.rssm.posterior_embed (there (64, 80), here (64, 64))" in fresh
    assert {x: x.read_bytes() for x in other.rglob("*") if x.is_file()} == before
    saved, source = (checkpoint.load(x / "checkpoint.pt") for x in (folder, other))
    assert saved["frames"] == 128 and saved["updates"] == 0 and saved["optimizer"]["state"] == {}
    for name in ("actor.net.hidden.0.weight", "critic.slow_net.hidden.0.weight"):
        assert torch.equal(saved["agent"][name], source["agent"][name])
    shutil.rmtree(other)
    caplog.clear()
    with caplog.at_level(logging.INFO, "latentplan"):
        train(run_config(folder, *items, "steps=192"))
    assert "resuming from frame 128" in caplog.text and "begin with" not in caplog.text


def test_a_kept_checkpoint_is_named_by_its_file(run: Path) -> None:
    path = run / "checkpoints" / "best.pt"
    initial = initial_weights.read(str(path))
    assert initial.path == path and initial.frames == checkpoint.load(path)["frames"]


def test_what_cannot_be_begun_from_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("weights")
    checkpoint.save(tmp_path / "typed.pt", {"frames": 3, "agent": {"actor": "text"}})
    for name, words in (
        ("nowhere", "neither a run folder nor a checkpoint file"),
        ("empty", "There is no checkpoint"),
        ("text.pt", "damaged or is not a checkpoint"),
        ("typed.pt", r"agent\['actor'\] is not a tensor"),
    ):
        config = run_config(tmp_path / "run", f"train.init_from={tmp_path / name}")
        with pytest.raises(UserError, match=words):
            train(config)
        assert not (tmp_path / "run").exists()
