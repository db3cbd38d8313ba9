from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    BOTH,
    VECTOR,
    WORLD,
    agent_config,
    differing_paths,
    initialize_zero_heads,
    leaves,
    random_batch,
    select_rows,
    world_config,
)
from torch import Tensor, nn

from latentplan.agent import Agent, NonFiniteLossError
from latentplan.config.schema import OptimConfig, PlanConfig
from latentplan.inspection.open_loop import open_loop
from latentplan.nn.distributions import TwoHot, categorical_kl
from latentplan.runs import checkpoint
from latentplan.types import EnvSpec, Timestep, WorldLoss


def make_agent(spec: EnvSpec = VECTOR, seed: int = 0, **behavior: Any) -> Agent:
    torch.manual_seed(seed)
    return Agent(spec, agent_config(**behavior))


def sharpen(agent: Agent) -> None:
    """Make the state depend on what is seen; at initialization it hardly does."""
    nn.init.normal_(agent.world.rssm.posterior_out.weight, std=5.0)


# --- acting ---------------------------------------------------------------------------------


def test_actions_stay_in_the_box() -> None:
    agent = make_agent()
    nn.init.normal_(agent.actor.net.output.weight, std=3.0)
    rows, carry = random_batch(20, 4)[0], agent.initial(20)
    outermost = 0.0
    for t in range(4):
        for mode in ("mean", "sample"):
            action, following = agent.act(select_rows(rows, t), carry, mode)
            assert action.shape == (20, 2) and not action.requires_grad
            outermost = max(outermost, action.abs().max().item())
        carry = following
    assert outermost == 1.0  # samples beyond are clipped


@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_acting_is_a_function_of_the_random_state(mode: str) -> None:
    agent, row = make_agent(), select_rows(random_batch(3, 1)[0], 0)
    actions = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        actions.append(agent.act(row, agent.initial(3), mode)[0])
    assert torch.equal(actions[0], actions[1])
    assert mode == "mean" or not torch.equal(actions[0], actions[2])


def test_mean_takes_the_mode_and_sample_samples() -> None:
    agent, row = make_agent(), select_rows(random_batch(3, 1)[0], 0)
    torch.manual_seed(0)
    action, carry = agent.act(row, agent.initial(3), "mean")
    torch.testing.assert_close(action, agent.actor(agent.world.features(carry)).mode)
    torch.manual_seed(0)
    explored, same = agent.act(row, agent.initial(3), "sample")
    assert torch.equal(carry.deter, same.deter) and not torch.allclose(action, explored)


def test_a_generator_of_its_own_leaves_the_global_one_alone() -> None:
    agent, row = make_agent(), select_rows(random_batch(3, 1)[0], 0)
    before = torch.get_rng_state()
    draw = lambda: agent.act(row, agent.initial(3), "sample", torch.Generator().manual_seed(3))  # noqa: E731
    assert torch.equal(draw()[0], draw()[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_environments_do_not_disturb_each_other() -> None:
    """The carry is all that an environment leaves behind, row by row."""
    agent = make_agent()
    sharpen(agent)
    rows = random_batch(2, 3)[0]
    carry = agent.initial(2)
    for t in range(3):
        other = select_rows(rows, t)
        other.obs["vector"][1] -= 5.0 * t
        torch.manual_seed(t)
        _, carry = agent.act(other, carry)
    alone = agent.initial(2)
    for t in range(3):
        torch.manual_seed(t)
        _, alone = agent.act(select_rows(random_batch(2, 3)[0], t), alone)
    torch.testing.assert_close(carry.deter[0], alone.deter[0])
    assert not torch.allclose(carry.deter[1], alone.deter[1])


# --- updates --------------------------------------------------------------------------------


def snapshot(agent: Agent) -> dict[str, Any]:
    state = {"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict()}
    return deepcopy(state | {"torch": torch.get_rng_state()})


@pytest.mark.parametrize("spec", [VECTOR, BOTH], ids=["vector", "both"])
def test_an_update_moves_everything_and_reports_detached_numbers(spec: EnvSpec) -> None:
    agent = make_agent(spec, gradient="pathwise")
    initialize_zero_heads(agent)
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    metrics = agent.update(*random_batch(6, 4, spec))
    still = [name for name, p in agent.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    losses = {name for name in metrics if name.startswith("train/loss/")}
    terms = {"dyn", "rep", "rew", "con", "policy", "value", "repval", *spec.obs}
    assert losses == {f"train/loss/{term}" for term in terms}
    for name, value in metrics.items():
        assert value.shape == () and value.isfinite() and not value.requires_grad, name


def test_learning_the_same_batch_again_and_again_lowers_its_loss() -> None:
    agent = make_agent(BOTH)
    batch, episode = random_batch(4, 4, BOTH)
    losses = [agent.update(batch, episode) for _ in range(80)]
    for term in ("image", "vector", "rew", "con"):
        first, last = (torch.stack([x[f"train/loss/{term}"] for x in part]).mean()
                       for part in (losses[:5], losses[-5:]))  # fmt: skip
        assert last < first, term


@pytest.mark.parametrize(
    ("field", "terms"), [("reward", ["rew", "repval"]), ("vector", ["vector", "dyn"])]
)
def test_a_bad_number_stops_before_the_weights_are_touched(field: str, terms: list[str]) -> None:
    agent = make_agent()
    batch, episode = random_batch(4, 3)
    agent.update(batch, episode)
    before = snapshot(agent)
    (batch.reward if field == "reward" else batch.obs["vector"])[1, 1] = float("nan")
    with pytest.raises(NonFiniteLossError) as caught:
        agent.update(batch, episode)
    assert all(term in str(caught.value) for term in terms)
    after = snapshot(agent)
    changed = {path.split("/")[2] for path in differing_paths(before, after) if "agent" in path}
    assert {name for name in changed if not name.startswith("return_scale.")} == set()
    assert [path for path in differing_paths(before, after) if "optimizer" in path] == []


def test_an_infinite_gradient_of_a_finite_loss_leaves_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = make_agent()
    batch, episode = random_batch(4, 4)
    loss = agent.world.loss

    def steep(*args: Any) -> WorldLoss:
        result = loss(*args)
        weight = agent.world.rssm.posterior_out.weight
        result.terms["steep"] = (
            (weight - weight.detach()).abs().sqrt().sum()
        )  # 0, of infinite slope
        return result

    monkeypatch.setattr(agent.world, "loss", steep)
    before = snapshot(agent)
    with pytest.raises(NonFiniteLossError, match=r"gradient .*world\.rssm\.posterior_out\.weight"):
        agent.update(batch, episode)
    changed = differing_paths(before, snapshot(agent))
    assert [p for p in changed if "optimizer" in p or ("agent" in p and "scale." not in p)] == []


def test_states_become_samples_over_the_first_updates() -> None:
    torch.manual_seed(0)
    agent = Agent(VECTOR, agent_config(replace(WORLD, anneal_updates=4)))
    batch, episode = random_batch(4, 4)
    seen = []
    for _ in range(6):
        seen.append(float(agent.world.rssm.hardness))
        agent.update(batch, episode)
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    latent, _ = agent.world.observe(batch)
    assert set(latent.stoch.unique().tolist()) == {0.0, 1.0}
    soft = Agent(VECTOR, agent_config(replace(WORLD, anneal_updates=4)))
    latent, _ = soft.world.observe(batch)
    assert 0.0 < latent.stoch.max() < 1.0
    soft.load_state_dict(agent.state_dict())  # a resumed run does not soften again
    assert float(soft.world.rssm.hardness) == 1.0


def test_half_precision_learns_as_well() -> None:
    config = agent_config()
    config = replace(config, train=replace(config.train, precision="bfloat16"))
    torch.manual_seed(0)
    agent = Agent(BOTH, config)
    batch, episode = random_batch(4, 4, BOTH)
    losses = [agent.update(batch, episode)["train/loss/image"] for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in agent.parameters())
    assert agent.act(select_rows(batch, 0), agent.initial(4))[0].dtype == torch.float32


def test_half_precision_gives_nearly_the_same_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to two roundings of 2^-8, and none where the bits are needed. States are probabilities
    here: a rounding may turn one sample into another."""
    plan = PlanConfig(candidates=3, imagine_fraction=0.0)  # in imagination a choice may jump, too
    full = replace(agent_config(world_config(anneal_updates=4)), plan=plan)
    half = replace(full, train=replace(full.train, precision="bfloat16"))
    seen: dict[str, set[torch.dtype]] = {"kl": set(), "two-hot": set()}

    def kl(*inputs: torch.Tensor) -> torch.Tensor:
        seen["kl"] |= {x.dtype for x in inputs}
        return categorical_kl(*inputs)

    def two_hot(self: TwoHot, *inputs: torch.Tensor) -> None:
        make_two_hot(self, *inputs)
        seen["two-hot"].add(self.logits.dtype)

    make_two_hot = TwoHot.__init__
    monkeypatch.setattr("latentplan.world.model.categorical_kl", kl)
    monkeypatch.setattr(TwoHot, "__init__", two_hot)
    losses = []
    for config in (full, half):
        torch.manual_seed(0)
        agent = Agent(BOTH, config)
        initialize_zero_heads(agent)
        nn.init.normal_(agent.world.rssm.posterior_out.weight)  # let states tell what was seen
        metrics = agent.update(*random_batch(4, 4, BOTH))
        losses.append({name: x for name, x in metrics.items() if "/loss/" in name})
    assert losses[0]["train/loss/image"] != losses[1]["train/loss/image"]
    torch.testing.assert_close(*losses, rtol=2**-7, atol=0)
    result = agent.behavior.plan(agent.initial(4), 0.5)
    tensors = [x for _, x in leaves(result) if x is not None]
    seen["plan"] = {x.dtype for x in tensors if x.is_floating_point()}
    assert all(dtypes == {torch.float32} for dtypes in seen.values()), seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_does_the_same() -> None:
    batch, episode = random_batch(4, 4, BOTH)
    rows = batch.to("cuda")
    torch.manual_seed(0)
    agent = Agent(BOTH, agent_config(), "cuda")
    metrics = agent.update(rows, episode.cuda())
    assert all(value.isfinite() for value in metrics.values())
    action, _ = agent.act(select_rows(rows, 0), agent.initial(4))
    assert action.device.type == "cuda"
    assert open_loop(agent, rows, 2)["image"].shape == (4, 4, 16, 16, 3)


def test_saving_and_loading_in_between_changes_nothing(tmp_path: Path) -> None:
    """N + M updates equal N, save, load, M: weights, optimizer and random state, bit for bit."""
    batches = [random_batch(4, 3, BOTH, seed) for seed in range(5)]

    whole = make_agent(BOTH)
    for batch in batches:
        whole.update(*batch)
    expected = snapshot(whole)

    first = make_agent(BOTH)
    for batch in batches[:3]:
        first.update(*batch)
    payload = snapshot(first) | {"random": checkpoint.random_state()}
    checkpoint.save(tmp_path / "checkpoint.pt", payload)

    second = make_agent(BOTH, seed=99)
    torch.rand(7)
    loaded = checkpoint.load(tmp_path / "checkpoint.pt")
    second.load_state_dict(loaded["agent"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    checkpoint.set_random_state(loaded["random"])
    for batch in batches[3:]:
        second.update(*batch)
    assert differing_paths(expected, snapshot(second)) == []
    # The comparison can fail:
    second.update(*batches[0])
    assert "/torch" in differing_paths(expected, snapshot(second))


def test_starts_may_be_a_fraction_of_the_rows() -> None:
    agent = make_agent(starts_fraction=0.5)
    chosen = agent.learner.choose_starts(24)
    assert len(chosen) == 12 == len(set(chosen.tolist()))
    assert sorted(make_agent().learner.choose_starts(24).tolist()) == list(range(24))
    assert len(make_agent().learner.choose_starts(25)) == 24  # of three members, as many rows each
    agent.update(*random_batch(4, 3))


def test_any_row_may_come_first() -> None:
    """Members are dealt out to blocks of rows: one order would give each the same rows for good."""
    config = agent_config(starts_fraction=0.5)
    agent = Agent(VECTOR, replace(config, plan=PlanConfig(candidates=3, imagine_fraction=0.5)))
    for choose in (agent.learner.choose_starts, agent.behavior.choose_planned):
        assert {int(choose(24)[0]) for _ in range(400)} == set(range(24))


def test_every_part_learns_at_its_own_rate() -> None:
    rates = {"world_lr": 1e-3, "actor_lr": 2e-3, "critic_lr": 3e-3, "temperature_lr": 4e-3}
    asked = OptimConfig(**rates, warmup=7, clip=0.2, beta1=0.8, beta2=0.95)
    agent = Agent(VECTOR, replace(agent_config(target_entropy=-1.0), optim=asked))
    groups = agent.optimizer.param_groups
    result = {p: group["lr"] for group in groups for p in group["params"]}
    parts = (agent.world, agent.actor, agent.critic.net, agent.temperature)
    for part_, rate in zip(parts, rates.values(), strict=True):
        assert {result[p] for p in part_.parameters()} == {rate}
    assert len(result) == sum(len(list(part_.parameters())) for part_ in parts)
    for group in groups:
        assert (group["warmup"], group["clip"]) == (7, 0.2)
        assert (group["beta1"], group["beta2"]) == (0.8, 0.95)
    assert agent.uncertainty_scale.warmup == 14


# --- looking --------------------------------------------------------------------------------


def test_open_loop_shows_reconstructions_then_predictions() -> None:
    agent = make_agent(BOTH)
    batch, _ = random_batch(2, 6, BOTH)
    decoded = open_loop(agent, batch, 2).decoded
    assert decoded["image"].shape == (2, 6, 16, 16, 3)
    assert decoded["vector"].shape == (2, 6, 3)
    assert ((decoded["image"] >= 0) & (decoded["image"] <= 1)).all()


def test_open_loop_sees_the_context_and_nothing_after_it() -> None:
    agent = make_agent(BOTH)
    sharpen(agent)
    batch, _ = random_batch(2, 6, BOTH)

    def seen(row: int, field: str) -> list[bool]:
        """Whether each row of the film changes with what is changed at ``row``."""
        changed = batch.map(lambda x: x.clone())
        if field == "obs":
            changed.obs["vector"][:, row] += 10
        else:
            changed.prev_action[:, row] = -changed.prev_action[:, row]
        films = []
        for rows in (batch, changed):
            torch.manual_seed(0)
            films.append(open_loop(agent, rows, 2).decoded["vector"])
        return [not torch.equal(films[0][:, t], films[1][:, t]) for t in range(6)]

    assert not any(seen(3, "obs"))
    assert seen(4, "action") == [False] * 4 + [True] * 2  # the action that led to row 4
    assert seen(1, "obs")[0] is False and any(seen(1, "obs"))


def test_context_rows_carry_no_loss_and_give_the_first_state() -> None:
    """Rewards and episodes of context rows have no effect; their observations have."""
    config = agent_config()
    config = replace(config, train=replace(config.train, context=2))
    batch, episode = random_batch(4, 6)

    def updated(batch: Timestep, episode: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(0)
        agent = Agent(VECTOR, config)
        agent.world.fit_normalizers = lambda obs: None  # statistics are those of all rows
        torch.manual_seed(1)
        agent.update(batch, episode)
        return agent.state_dict()

    unseen = batch._replace(reward=batch.reward.clone())
    unseen.reward[:, :2] += 5.0
    other = episode.clone()
    other[:, :2] += 100
    seen = batch._replace(obs={"vector": batch.obs["vector"].clone()})
    seen.obs["vector"][:, 1] += 5.0
    one = updated(batch, episode)
    assert differing_paths(one, updated(unseen, other)) == []
    assert differing_paths(one, updated(seen, episode)) != []


def test_noise_is_added_to_the_mean_in_the_training_environments() -> None:
    row = select_rows(random_batch(512, 1)[0], 0)

    def spread(**behavior: Any) -> float:
        agent = Agent(VECTOR, agent_config(std_min=0.02, std_max=0.02, **behavior))
        return float(agent.explore(row, agent.initial(512))[0].std())

    quiet = spread(explore="mean")
    assert 0.19 < spread(explore="mean", explore_noise=0.2) < 0.21 + quiet
    assert spread(explore="sample", explore_noise=0.2) < 0.05 + quiet
