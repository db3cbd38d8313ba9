"""Compiled functions do what the plain ones do."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOTH, VECTOR, WORLD, agent_config, random_batch, run_config, world_config

from latentplan.agent import Agent
from latentplan.cli.main import main
from latentplan.config.loading import load, to_yaml
from latentplan.config.schema import PlanConfig, WorldConfig
from latentplan.runs import checkpoint
from latentplan.runs.run_folder import CHANGEABLE
from latentplan.training import compiling
from latentplan.training.compiling import compile_agent, why_not_compilable
from latentplan.training.loop import train
from latentplan.types import EnvSpec, UserError

needs_compiler = pytest.mark.skipif(
    why_not_compilable(torch.device("cpu")) is not None, reason="there is no C++ compiler"
)


def make_agent() -> Agent:
    torch.manual_seed(0)
    return Agent(BOTH, replace(agent_config(), plan=PlanConfig(candidates=3, horizon=2)))


def configured(
    spec: EnvSpec, world: WorldConfig = WORLD, behavior: Any = None, **sections: Any
) -> Agent:
    """With something to say where heads start at zero: else no gradient comes back through them."""
    torch.manual_seed(0)
    config = agent_config(world, horizon=2, **behavior or {})
    changes = {name: replace(getattr(config, name), **x) for name, x in sections.items()}
    agent = Agent(spec, replace(config, **changes))
    for net in (agent.world.reward, agent.critic.net, agent.critic.slow_net):
        torch.nn.init.normal_(net.output.weight, std=0.3)
    return agent


SOFT = world_config(anneal_updates=4)  # states harden without a new compilation
PLAN = {"candidates": 3, "horizon": 2}
MPDP = {"improvement": "mpdp", "gradient": "pathwise", "replay_scale": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "reinforce": {"spec": BOTH, "world": SOFT, "plan": PLAN},
    "pathwise": {"spec": VECTOR, "behavior": {"gradient": "pathwise"}, "plan": PLAN},
    "shared": {
        "spec": VECTOR,
        "behavior": MPDP,
        "plan": PLAN,
        "mpdp": {"policies": "shared", "horizon": 2},
        "distill": {"weight": 1.0},
    },
    "per_step": {
        "spec": VECTOR,
        "behavior": MPDP,
        "mpdp": {"policies": "per_step", "horizon": 2},
    },
}


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_compiled_and_plain_agree(name: str) -> None:
    """An update moves a weight by about the rate, 1e-3, whatever its gradient's size: where the
    gradients differed, the weights would differ by as much. Rounding leaves 1e-6."""
    plain, fast = (configured(**CASES[name]) for _ in range(2))
    assert compile_agent(fast, "on") == "on"
    assert plain.state_dict().keys() == fast.state_dict().keys()
    spec = plain.world.spec
    for seed in range(2):
        metrics = []
        for agent in (plain, fast):
            torch.manual_seed(seed)
            metrics.append(agent.update(*random_batch(3, 4, spec, seed)))
        torch.testing.assert_close(metrics[0], metrics[1], rtol=2e-4, atol=1e-5)
        weights = (dict(agent.named_parameters()) for agent in (plain, fast))
        torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    if name != "reinforce":
        return  # acting takes no gradient: once is enough
    row = random_batch(2, 1, spec)[0].map(lambda x: x[:, 0])
    actions = []
    for agent in (plain, fast):
        torch.manual_seed(9)
        actions.append(agent.explore(row, agent.initial(2))[0])
    torch.testing.assert_close(actions[0], actions[1], rtol=1e-4, atol=1e-4)


def test_a_run_compiles_by_default() -> None:
    agent = make_agent()
    assert compile_agent(agent, "off") == "off" and "_step" not in vars(agent.world)
    auto = compile_agent(agent, load().train.compile)
    assert auto == ("on" if why_not_compilable(agent.device) is None else "off")
    assert ("_step" in vars(agent.world)) == (auto == "on")
    for words in (["size=tiny"], ["train.compile=off"], ["train.compile=False"]):
        assert load([], words).train.compile == "off"


def test_without_a_compiler_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: object, **settings: object) -> object:
        def call(*args: object) -> None:
            raise RuntimeError("No working C++ compiler found\nlong story")

        return call

    monkeypatch.setattr(compiling.torch, "compile", broken)
    agent = make_agent()
    assert compile_agent(agent, "on") == "off" and "_step" not in vars(agent.world)
    assert "No working C++ compiler found" in caplog.text and "long story" not in caplog.text


@needs_compiler
def test_a_compiler_that_fails_later_leaves_functions_as_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, fast = make_agent(), make_agent()
    assert compile_agent(fast, "on") == "on"
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/bin/false",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    for agent in (plain, fast):
        torch.manual_seed(0)
        agent.update(*random_batch(2, 3, BOTH))
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_choice_is_a_setting_of_the_session() -> None:
    assert load([], ["train.compile=on"]).train.compile == "on"
    assert "train.compile" in CHANGEABLE
    with pytest.raises(UserError, match=r"train\.compile"):
        load([], ["train.compile=yes"])


def _compiler_failures() -> list[Exception]:
    from torch._inductor.exc import CppCompileError, InductorError

    killed = CppCompileError(["g++"], "g++: fatal error: Interrupt signal terminated cc1plus")
    return [killed, InductorError(killed, None)]


@pytest.mark.parametrize("kind", [0, 1], ids=["CppCompileError", "InductorError"])
def test_ctrl_c_that_kills_the_compiler_saves_and_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    folder, original, weights = tmp_path / "run", Agent.update, []

    def killed(self: Agent, *arguments: Any) -> Any:
        if len(weights) < 3:
            metrics = original(self, *arguments)
            weights.append({name: x.clone() for name, x in self.named_parameters()})
            return metrics
        signal.raise_signal(signal.SIGINT)
        raise _compiler_failures()[kind]

    monkeypatch.setattr(Agent, "update", killed)
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(run_config(folder, "steps=1_000_000")))
    assert main(["train", str(config)]) == 0
    saved = checkpoint.load(folder / "checkpoint.pt")
    assert saved["updates"] == 3
    assert all(torch.equal(x, saved["agent"][name]) for name, x in weights[-1].items())
    monkeypatch.undo()
    more = saved["frames"] + 64
    train(run_config(folder, f"steps={more}"))
    assert checkpoint.load(folder / "checkpoint.pt")["updates"] > 3


@pytest.mark.parametrize("stopped", [False, True])
def test_other_failures_of_an_update_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """A compiler that fails though nobody stopped the run, and an error of another kind."""
    error = RuntimeError("a bug") if stopped else _compiler_failures()[1]

    def failing(self: Agent, *arguments: Any) -> Any:
        if stopped:
            signal.raise_signal(signal.SIGINT)
        raise error

    monkeypatch.setattr(Agent, "update", failing)
    with pytest.raises(RuntimeError) as caught:
        train(run_config(tmp_path / "run"))
    assert caught.value is error
