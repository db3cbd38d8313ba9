from __future__ import annotations

import math

import pytest
import torch
from tiny import VECTOR, random_batch, world_config
from torch import Tensor

from latentplan.types import Latent, StepNoise
from latentplan.world.model import WorldModel, bootstrap_mask
from latentplan.world.uncertainty import MEASURES, Probes, jsd, kl_rest, member_std

# Two members, one row, one group of two classes.
P = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).view(2, 1, 1, 2)


def random_probs(members: int = 4, scale: float = 1.0) -> Tensor:
    """Probabilities (M, 50, 3, 5). The disagreement of the members grows from row to row."""
    rng = torch.Generator().manual_seed(0)
    common = torch.randn(1, 50, 3, 5, generator=rng)
    own = torch.randn(members, 50, 3, 5, generator=rng)
    return (common + scale * torch.linspace(0, 10, 50).view(50, 1, 1) * own).softmax(-1)


def test_jsd_golden_number() -> None:
    # H(0.6, 0.4) - (H(0.8, 0.2) + H(0.4, 0.6)) / 2 = 0.673012 - (0.500402 + 0.673012) / 2
    assert jsd(P).item() == pytest.approx(0.086305, abs=1e-6)


def test_std_golden_number() -> None:
    assert member_std(P).item() == pytest.approx(0.2)


def test_kl_rest_golden_number() -> None:
    # 0.8 ln 2 + 0.2 ln (1/3)  +  0.4 ln (1/2) + 0.6 ln 3
    expected = 0.4 * math.log(2) + 0.4 * math.log(3)
    assert kl_rest(P).item() == pytest.approx(expected, abs=1e-6)


def test_measures_are_means_over_groups() -> None:
    two = torch.cat([P, P.mean(0, keepdim=True).expand_as(P)], 2)  # the second group agrees
    for measure in MEASURES.values():
        assert measure(two).item() == pytest.approx(measure(P).item() / 2, abs=1e-5)


def test_measures_equal_loops_over_members() -> None:
    p = random_probs(scale=0.3)
    kl = lambda a, b: (a * (a / b).log()).sum(-1).mean(-1)  # noqa: E731
    others = [torch.cat([p[:m], p[m + 1 :]]).mean(0) for m in range(4)]
    torch.testing.assert_close(kl_rest(p), sum(kl(p[m], others[m]) for m in range(4)))
    torch.testing.assert_close(jsd(p), sum(kl(p[m], p.mean(0)) for m in range(4)) / 4)
    expected = p.std(0, correction=0).mean((-1, -2))
    torch.testing.assert_close(member_std(p), expected, atol=2e-6, rtol=1e-4)


def test_jsd_lies_between_zero_and_the_log_of_members() -> None:
    value = jsd(random_probs())
    assert value.shape == (50,)
    assert (value > -1e-6).all() and (value < math.log(4)).all()
    disjoint = (torch.eye(4).view(4, 1, 1, 4) * 1e4).softmax(-1).clamp(min=1e-20)
    assert jsd(disjoint).item() == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_members_that_agree_have_no_uncertainty(measure) -> None:
    p = random_probs(1).expand(4, 50, 3, 5)
    torch.testing.assert_close(measure(p), torch.zeros(50), atol=2e-6, rtol=0)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_more_disagreement_is_more_uncertainty(measure) -> None:
    value = measure(random_probs())
    assert value[40:].mean() > value[5:15].mean() > value[:2].mean()


def test_a_batch_in_pieces_gives_the_same_uncertainty(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = WorldModel(VECTOR, world_config())
    latent = Latent(torch.randn(20, 16).tanh(), torch.rand(20, 3, 4))
    action, noise = torch.randn(20, 2), first_step(model.draw_noise(20, 1))
    whole = model.step(latent, action, noise).uncertainty
    monkeypatch.setattr("latentplan.nn.cache.NUMBERS", 7 * 3 * 3 * 4)  # seven rows of members x 12
    torch.testing.assert_close(model.step(latent, action, noise).uncertainty, whole)


def first_step(noise: StepNoise) -> StepNoise:
    return StepNoise(*(None if x is None else x[0] for x in noise))


# --- probes ---------------------------------------------------------------------------------


def probe_model() -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(VECTOR, world_config(uncertainty="probes", bootstrap=1.0))


def probe_loss(model: WorldModel, latent: Latent, first: list[int]) -> Tensor:
    batch, episode = random_batch(2, 5)
    batch.is_first[:, first] = True
    return model._probe_loss(model.probes, latent, batch, bootstrap_mask(episode, 3, 1.0))[0]


def change_last_row(latent: Latent) -> Latent:
    stoch = latent.stoch.clone()
    stoch[:, -1] = stoch[:, -1].roll(1, -1)
    return latent._replace(stoch=stoch)


def test_probes_predict_the_next_state_only_within_an_episode() -> None:
    model = probe_model()
    latent = model.observe(random_batch(2, 5)[0])[0]
    other = change_last_row(latent)  # the last row serves only as a target
    assert probe_loss(model, latent, [0]) != probe_loss(model, other, [0])
    assert probe_loss(model, latent, [0, 4]) == probe_loss(model, other, [0, 4])


def test_the_probe_loss_trains_only_the_probes() -> None:
    model = probe_model()
    latent = model.observe(random_batch(2, 5)[0])[0]
    probe_loss(model, latent, [0]).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("probes."), name


def test_probe_loss_golden_number() -> None:
    probes = Probes(2, 3, 1, 4, 2)
    for parameter in probes.parameters():
        torch.nn.init.zeros_(parameter)
    probes.net.layers[-1].bias.data = torch.tensor([[[0.5, 0.0]], [[1.0, 1.0]]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mask = torch.tensor([[True, False], [True, True]])
    loss, uncertainty = probes.loss(torch.ones(2, 3), torch.ones(2, 1), target, mask)
    assert uncertainty.tolist() == pytest.approx([0.375, 0.375])
    # member 0, row 0: (0.25 + 0) / 2;  member 1: (0 + 1) / 2 on both rows
    assert loss.item() == pytest.approx((0.125 + 0.5 + 0.5) / 3)
    value = probes.uncertainty(torch.ones(2, 3), torch.ones(2, 1))
    assert value.tolist() == pytest.approx([0.375, 0.375])  # mean of the std of (0.5, 1) and (0, 1)


def test_probes_learn_the_next_state() -> None:
    """The uncertainty becomes small on training inputs and stays large far from them."""
    torch.manual_seed(0)
    probes = Probes(5, 2, 1, 32, 2)
    optimizer = torch.optim.Adam(probes.parameters(), 1e-2)
    features, action = torch.rand(256, 2) - 0.5, torch.rand(256, 1) - 0.5
    target = torch.cat([features[:, :1] * action, features[:, 1:] + action], 1)
    mask = torch.rand(5, 256) < 0.8
    for _ in range(150):
        optimizer.zero_grad()
        probes.loss(features, action, target, mask)[0].backward()
        optimizer.step()
    near = probes.uncertainty(features, action).mean()
    far = probes.uncertainty(4 * features + 3, action).mean()
    assert near < 0.05 and far > 5 * near
