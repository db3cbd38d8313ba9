from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tiny import VECTOR, agent_config, random_batch, world_config
from torch import Tensor
from torch.nn import functional as F

from latentplan.agent import Agent
from latentplan.nn.ensemble import EnsembleLinear, EnsembleMLP, bootstrap_mask
from latentplan.nn.layers import BlockLinear

MEMBERS = 3


# --- stacked layers -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (MEMBERS, 7, 5)])
def test_stacked_linear_is_a_loop_over_members(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = EnsembleLinear(MEMBERS, 5, 4)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(shape)
    out = layer(x)
    assert out.shape == (MEMBERS, 7, 4)
    for m in range(MEMBERS):
        own = x if x.ndim == 2 else x[m]
        torch.testing.assert_close(out[m], own @ layer.weight[m] + layer.bias[m])


def test_stacked_mlp_is_a_loop_over_members() -> None:
    torch.manual_seed(0)
    net = EnsembleMLP(MEMBERS, 5, 8, 2, 4)
    x = torch.randn(7, 5)
    out = net(x)
    for m in range(MEMBERS):
        own = x
        for layer in net.layers[:-1]:
            own = own @ layer.weight[m] + layer.bias[m]
            own = F.silu(F.layer_norm(own, own.shape[-1:], eps=1e-4))
        own = own @ net.layers[-1].weight[m] + net.layers[-1].bias[m]
        torch.testing.assert_close(out[m], own)


def test_one_member_gives_its_output_in_the_ensemble() -> None:
    torch.manual_seed(0)
    net = EnsembleMLP(MEMBERS, 5, 8, 2, 4)
    for layer in net.layers:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 7, 5)
    for m in range(MEMBERS):
        torch.testing.assert_close(net.one(x, m), net(x.flatten(0, 1))[m].view(2, 7, 4))


def test_block_linear_is_a_loop_over_blocks() -> None:
    torch.manual_seed(0)
    layer, x = BlockLinear(2, 5, 4), torch.randn(2, 7, 5)
    for g in range(2):
        torch.testing.assert_close(layer(x)[g], x[g] @ layer.weight[g])


def test_members_differ_at_initialization() -> None:
    torch.manual_seed(0)
    net = EnsembleMLP(MEMBERS, 5, 8, 1, 4)
    out = net(torch.randn(100, 5))
    for layer in net.layers:
        for a in range(MEMBERS):
            for b in range(a):
                correlation = torch.corrcoef(layer.weight[[a, b]].flatten(1))[0, 1]
                assert abs(correlation) < 0.6
    assert out.std(0).mean() > 0.3


def test_initial_weights_have_the_variance_of_their_fan_in() -> None:
    torch.manual_seed(0)
    weight = EnsembleLinear(MEMBERS, 100, 200).weight
    for member in weight:
        assert member.std().item() == pytest.approx(0.1, rel=0.05)


# --- bootstrap ------------------------------------------------------------------------------


def test_the_mask_is_fixed_per_member_and_episode() -> None:
    episode = torch.arange(200)
    mask = bootstrap_mask(episode, 5, 0.8)
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bootstrap_mask(shuffled, 5, 0.8), mask[:, shuffled])
    assert torch.equal(bootstrap_mask(episode.view(4, 50), 5, 0.8), mask.view(5, 4, 50))
    assert torch.equal(
        bootstrap_mask(episode, 3, 0.8), mask[:3]
    )  # independent of the number of members


def test_a_single_member_learns_from_all_episodes() -> None:
    assert torch.equal(bootstrap_mask(torch.arange(200), 1, 0.8), torch.ones(1, 200).bool())


@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_each_member_gets_its_fraction_of_episodes(fraction: float) -> None:
    got = bootstrap_mask(torch.arange(20_000), 7, fraction).float().mean(1)
    torch.testing.assert_close(got, torch.full((7,), fraction), atol=0.015, rtol=0)


@pytest.mark.parametrize("step", [1, 2, 8, 1000])
def test_members_choose_independently(step: int) -> None:
    """This also holds for every ``step``-th episode, as one of several environments produces."""
    mask = bootstrap_mask(torch.arange(0, 20_000 * step, step), 7, 0.8).float()
    correlation = torch.corrcoef(mask) - torch.eye(7)
    assert correlation.abs().max() < 0.03


def test_a_fraction_of_one_selects_all_episodes_and_zero_selects_none() -> None:
    episode = torch.arange(1000)
    assert bootstrap_mask(episode, 5, 1.0).all() and not bootstrap_mask(episode, 5, 0.0).any()


# --- learning -------------------------------------------------------------------------------


def member_weights(agent: Agent) -> list[Tensor]:
    return [p.detach().clone() for p in agent.world.rssm.priors.parameters()]


def moved(before: list[Tensor], after: list[Tensor]) -> list[bool]:
    """Whether all weight tensors of each member changed."""
    return [all((a[m] != b[m]).any() for a, b in zip(before, after, strict=True)) for m in range(3)]


def test_every_member_moves_in_one_update() -> None:
    torch.manual_seed(0)
    agent = Agent(VECTOR, agent_config())
    batch, episode = random_batch(8, 4)
    assert bootstrap_mask(episode[:, 0], 3, 0.8).any(1).all()  # each member owns an episode
    before = member_weights(agent)
    agent.update(batch, episode)
    assert moved(before, member_weights(agent)) == [True, True, True]


def test_a_member_learns_only_from_its_own_episodes() -> None:
    mask = bootstrap_mask(torch.arange(1000), 3, 0.8)
    number = int((mask.sum(0) == 2).nonzero()[0])  # an episode that exactly one member does not own
    torch.manual_seed(0)
    agent = Agent(VECTOR, agent_config())
    batch, episode = random_batch(8, 4)
    before = member_weights(agent)
    agent.update(batch, torch.full_like(episode, number))
    assert moved(before, member_weights(agent)) == mask[:, number].tolist()


def test_without_a_bootstrap_all_members_learn_from_everything() -> None:
    torch.manual_seed(0)
    agent = Agent(VECTOR, agent_config(world_config(bootstrap=1.0)))
    batch, episode = random_batch(1, 4)
    before = member_weights(agent)
    agent.update(batch, episode)
    assert moved(before, member_weights(agent)) == [True, True, True]


def test_every_probe_learns_only_from_its_own_episodes() -> None:
    torch.manual_seed(0)
    agent = Agent(VECTOR, agent_config(world_config(uncertainty="probes")))
    batch, episode = random_batch(8, 4)
    before = [p.detach().clone() for p in agent.world.probes.parameters()]
    agent.update(batch, episode)
    after = list(agent.world.probes.parameters())
    assert moved(before, after) == [True, True, True]

    mask = bootstrap_mask(torch.arange(1000), 3, 0.8)
    number = int((mask.sum(0) == 2).nonzero()[0])
    before = [p.detach().clone() for p in after]
    fresh = Agent(VECTOR, agent.config)  # an optimizer without momentum
    fresh.load_state_dict(deepcopy(agent.state_dict()))
    fresh.update(batch, torch.full_like(episode, number))
    assert moved(before, list(fresh.world.probes.parameters())) == mask[:, number].tolist()
