from __future__ import annotations

import torch
from tiny import BOTH, VECTOR, agent_config, random_batch, world_config

from latentplan.agent import Agent
from latentplan.nn.distributions import symlog
from latentplan.world.model import WorldModel
from latentplan.world.vector_normalizer import FLOOR, LIMIT, VectorNormalizer


def entries(n: int, seed: int = 0) -> torch.Tensor:
    """Vectors (n, 3): millimeters beside hundreds, and a constant."""
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([0.005, 300.0, 0.0]) + torch.tensor([0.1, 0.0, 2.0])


def test_without_statistics_vectors_are_only_squashed() -> None:
    x = torch.tensor([[0.5, -3.0, 100.0]])
    torch.testing.assert_close(VectorNormalizer(3).normalize(x), symlog(x))


def test_all_entries_get_the_same_spread_and_come_back() -> None:
    normalizer = VectorNormalizer(3)
    for seed in range(5):
        normalizer.fit(entries(64, seed).unflatten(0, (8, 8)))
    x = entries(4000, 77)
    standardized = normalizer.normalize(x)
    assert (standardized[:, :2].std(0) - 1).abs().max() < 0.1
    assert standardized[:, 2].abs().max() < 1e-3
    torch.testing.assert_close(normalizer.denormalize(standardized), symlog(x))


def test_the_statistics_are_those_of_all_batches() -> None:
    normalizer = VectorNormalizer(3)
    batches = [entries(16, seed) for seed in range(3)]
    for batch in batches:
        normalizer.fit(batch)
    x = symlog(torch.cat(batches))
    torch.testing.assert_close(normalizer.mean, x.mean(0))
    torch.testing.assert_close(normalizer.spread, x.std(0, correction=0).clamp(min=FLOOR))


def test_a_sensor_that_is_silent_at_first_is_bounded_and_then_followed() -> None:
    """A touch sensor reads 0 in random play, and then 5 in a tenth of the rows."""
    normalizer, silent = VectorNormalizer(1), torch.zeros(64, 1)
    for _ in range(200):
        normalizer.fit(silent)
    touching = torch.where(torch.arange(64)[:, None] % 10 == 0, 5.0, 0.0)
    assert normalizer.normalize(touching).amax() == LIMIT
    for _ in range(3000):
        normalizer.fit(touching)
    assert 0.8 < normalizer.normalize(touching).std() < 1.2


def test_an_update_fits_the_statistics_and_the_state_dict_holds_them() -> None:
    agent, other = (Agent(BOTH, agent_config()) for _ in range(2))
    agent.update(*random_batch(2, 4, BOTH))
    fitted = agent.world.vector_normalizers["vector"]
    assert fitted.batches == 1 and fitted.mean.abs().min() > 0
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.world.vector_normalizers["vector"].spread, fitted.spread)


def test_frozen_statistics_stay() -> None:
    normalizer = VectorNormalizer(3)
    normalizer.freeze()
    normalizer.fit(entries(8))
    torch.testing.assert_close(normalizer.normalize(entries(8)), symlog(entries(8)).clamp(-10, 10))


def test_decoded_vectors_are_in_symlog_units() -> None:
    """An entry that is far from zero is decoded there, although its standardized value is small."""
    torch.manual_seed(0)
    world = WorldModel(VECTOR, world_config())
    obs = {"vector": 1000 + torch.rand(64, *VECTOR.obs["vector"][0])}
    world.fit_normalizers(obs)
    decoded = world.decode(world.initial(2))["vector"]
    torch.testing.assert_close(decoded, symlog(torch.full_like(decoded, 1000.5)), rtol=0, atol=0.1)
