"""Compiled functions give the same results as uncompiled ones."""

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
from latentplan.runs.resuming import CHANGEABLE
from latentplan.training import compiling
from latentplan.training.compiling import compile_agent, why_not_compilable
from latentplan.training.session import train
from latentplan.types import EnvSpec, UserError

needs_compiler = pytest.mark.skipif(
    why_not_compilable(torch.device("cpu")) is not None, reason="there is no C++ compiler"
)


def make_agent() -> Agent:
    torch.manual_seed(0)
    return Agent(BOTH, replace(agent_config(), plan=PlanConfig(candidates=3, horizon=2)))


def configured_agent(
    spec: EnvSpec, world: WorldConfig = WORLD, behavior: Any = None, **sections: Any
) -> Agent:
    """An agent whose zero-initialized heads are random, so that gradients flow through them."""
    torch.manual_seed(0)
    config = agent_config(world, horizon=2, **behavior or {})
    changes = {name: replace(getattr(config, name), **x) for name, x in sections.items()}
    agent = Agent(spec, replace(config, **changes))
    for net in (agent.world.reward, agent.critic.net, agent.critic.slow_net):
        torch.nn.init.normal_(net.output.weight, std=0.3)
    return agent


ANNEALED = world_config(anneal_updates=4)  # annealing must not need a new compilation
PLAN = {"candidates": 3, "horizon": 2}
MPDP = {"improvement": "mpdp", "gradient": "pathwise", "replay_scale": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "reinforce": {"spec": BOTH, "world": ANNEALED, "plan": PLAN},
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
def test_compiled_and_uncompiled_agents_agree(name: str) -> None:
    """Weights after two updates agree to 1e-5.

    An update moves a weight by about the learning rate, 1e-3, for a gradient of any size. Different
    gradients would therefore change the weights by as much. Rounding changes them by 1e-6.
    """
    plain, compiled = (configured_agent(**CASES[name]) for _ in range(2))
    assert compile_agent(compiled, "on") == "on"
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    spec = plain.world.spec
    for seed in range(2):
        metrics = []
        for agent in (plain, compiled):
            torch.manual_seed(seed)
            metrics.append(agent.update(*random_batch(3, 4, spec, seed)))
        torch.testing.assert_close(metrics[0], metrics[1], rtol=2e-4, atol=1e-5)
        weights = (dict(agent.named_parameters()) for agent in (plain, compiled))
        torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    if name != "reinforce":
        return  # acting does not depend on the objective, so one case is enough
    row = random_batch(2, 1, spec)[0].map(lambda x: x[:, 0])
    actions = []
    for agent in (plain, compiled):
        torch.manual_seed(9)
        actions.append(agent.explore(row, agent.initial(2))[0])
    torch.testing.assert_close(actions[0], actions[1], rtol=1e-4, atol=1e-4)


def test_a_run_compiles_by_default() -> None:
    agent = make_agent()
    assert compile_agent(agent, "off") == "off" and "_step" not in vars(agent.world)
    auto = compile_agent(agent, load().train.compile)
    assert auto == ("on" if why_not_compilable(agent.device) is None else "off")
    assert ("_step" in vars(agent.world)) == (auto == "on")
    for overrides in (["size=tiny"], ["train.compile=off"], ["train.compile=False"]):
        assert load([], overrides).train.compile == "off"


def test_without_a_compiler_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: object, **settings: object) -> object:
        def call(*args: object) -> None:
            raise RuntimeError("No working C++ compiler found\nfurther lines")

        return call

    monkeypatch.setattr(compiling.torch, "compile", broken)
    agent = make_agent()
    assert compile_agent(agent, "on") == "off" and "_step" not in vars(agent.world)
    assert "No working C++ compiler found" in caplog.text and "further lines" not in caplog.text


@needs_compiler
def test_functions_run_uncompiled_if_the_compiler_fails_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, compiled = make_agent(), make_agent()
    assert compile_agent(compiled, "on") == "on"
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/bin/false",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    # Gradients are left out: their graphs are compiled in `backward()`, which then raises.
    row = random_batch(2, 1, BOTH)[0].map(lambda x: x[:, 0])
    actions = []
    for agent in (plain, compiled):
        torch.manual_seed(0)
        actions.append(agent.explore(row, agent.initial(2))[0])
    assert torch.equal(actions[0], actions[1])


def test_compilation_may_change_between_sessions() -> None:
    assert load([], ["train.compile=on"]).train.compile == "on"
    assert "train.compile" in CHANGEABLE
    with pytest.raises(UserError, match=r"train\.compile"):
        load([], ["train.compile=yes"])


def _compiler_failures() -> list[Exception]:
    from torch._inductor.exc import CppCompileError, InductorError

    killed = CppCompileError(["g++"], "g++: fatal error: Interrupt signal terminated cc1plus")
    return [killed, InductorError(killed, None)]


@pytest.mark.parametrize("kind", [0, 1], ids=["CppCompileError", "InductorError"])
def test_ctrl_c_that_kills_the_compiler_saves_a_checkpoint(
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
    assert main(["train", str(config)]) == 128 + signal.SIGINT
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
    """These are a compiler failure without a stop request, and another error with one."""
    error = RuntimeError("a bug") if stopped else _compiler_failures()[1]

    def failing(self: Agent, *arguments: Any) -> Any:
        if stopped:
            signal.raise_signal(signal.SIGINT)
        raise error

    monkeypatch.setattr(Agent, "update", failing)
    with pytest.raises(RuntimeError) as caught:
        train(run_config(tmp_path / "run"))
    assert caught.value is error
