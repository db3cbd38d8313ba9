from __future__ import annotations

import pytest
import torch
from tiny import BOTH, VECTOR, random_batch, select_rows, world_config
from torch import Tensor

from latentplan.nn.distributions import mixed_probs
from latentplan.types import EnvSpec, Latent, StepNoise, Timestep
from latentplan.world.model import WorldModel
from latentplan.world.rssm import bound_action


def world(spec: EnvSpec = VECTOR, seed: int = 0, **changes: object) -> WorldModel:
    torch.manual_seed(seed)
    return WorldModel(spec, world_config(**changes))


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(1))


def with_first(batch: Timestep, rows: list[int]) -> Timestep:
    """A batch in which episodes begin at the given rows."""
    is_first = torch.zeros_like(batch.is_first)
    is_first[:, rows] = True
    action = batch.prev_action * ~is_first[..., None]
    return batch._replace(is_first=is_first, prev_action=action)


def assert_latents_close(one: Latent, other: Latent) -> None:
    assert torch.equal(one.stoch, other.stoch)
    torch.testing.assert_close(one.deter, other.deter)


# --- filtering ------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [VECTOR, BOTH], ids=["vector", "both"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_observing_is_filtering_row_by_row(spec: EnvSpec, norm: str) -> None:
    model = world(spec, norm=norm)
    batch = with_first(random_batch(4, 7, spec)[0], [0, 3])
    noise = uniform(4, 7)
    observed, logits = model.observe(batch, noise)
    assert observed.deter.shape == (4, 7, 16) and observed.stoch.shape == (4, 7, 3, 4)
    assert logits.shape == (4, 7, 3, 4)
    latent = model.initial(4)
    for t in range(7):
        latent = model.filter(select_rows(batch, t), latent, noise[:, t])
        assert_latents_close(latent, Latent(*(x[:, t] for x in observed)))


def test_sequences_go_on_from_given_states() -> None:
    model, noise = world(), uniform(4, 7)
    batch = with_first(random_batch(4, 7)[0], [0])
    whole, logits = model.observe(batch, noise)
    start = whole.map(lambda x: x[:, 2])
    rest, rest_logits = model.observe(select_rows(batch, slice(3, 7)), noise[:, 3:], start=start)
    assert_latents_close(rest, whole.map(lambda x: x[:, 3:]))
    torch.testing.assert_close(rest_logits, logits[:, 3:])


def test_blocks_of_the_core_see_each_other() -> None:
    """A change in the last block changes every block of the next state."""
    model = world(blocks=4)
    latent, action = some_latent(model, 5), torch.zeros(5, 2)
    changed = latent._replace(deter=latent.deter.clone())
    changed.deter[:, -4:] += 1
    one, other = (model.rssm.recur(x, model.rssm.prepare_action(action)) for x in (latent, changed))
    moved = (one - other).unflatten(-1, (4, 4)).abs().amax(-1)
    assert (moved > 1e-4).all()


def test_rows_depend_only_on_earlier_rows() -> None:
    model, noise = world(), uniform(4, 6)
    batch = random_batch(4, 6)[0]
    changed = batch._replace(obs={"vector": batch.obs["vector"].clone()})
    changed.obs["vector"][:, 4] += 3
    one, other = (model.observe(rows, noise)[0].deter for rows in (batch, changed))
    assert torch.equal(
        one[:, :5], other[:, :5]
    )  # row 4 changes its own posterior and later deterministic states
    assert not torch.equal(one[:, 5], other[:, 5])


def test_a_first_row_forgets_the_past() -> None:
    model, noise = world(), uniform(4, 7)
    batch = with_first(random_batch(4, 7)[0], [0, 3])
    whole, _ = model.observe(batch, noise)
    anew, _ = model.observe(select_rows(batch, slice(3, None)), noise[:, 3:])
    assert_latents_close(Latent(*(x[:, 3:] for x in whole)), anew)
    going_on, _ = model.observe(with_first(batch, [0]), noise)
    assert not torch.allclose(going_on.deter[:, 3:], anew.deter)


def test_resets_are_per_row() -> None:
    model = world()
    row = select_rows(random_batch(2, 2)[0], 1)
    row = row._replace(
        is_first=torch.tensor([True, False]), prev_action=torch.zeros_like(row.prev_action)
    )
    generator = torch.Generator().manual_seed(0)
    carry = Latent(torch.randn(2, 16, generator=generator), torch.eye(4)[:3].expand(2, 3, 4))
    noise = uniform(2)
    after = model.filter(row, carry, noise)
    fresh = model.filter(row._replace(is_first=torch.ones(2).bool()), model.initial(2), noise)
    torch.testing.assert_close(after.deter[0], fresh.deter[0])
    assert not torch.allclose(after.deter[1], fresh.deter[1])


# --- one step ahead -------------------------------------------------------------------------


def some_latent(model: WorldModel, n: int) -> Latent:
    return Latent(*(x[:, -1] for x in model.observe(random_batch(n, 3)[0], uniform(n, 3))[0]))


@pytest.mark.parametrize("uncertainty", ["jsd", "std", "kl_rest", "probes"])
def test_a_step_with_given_noise_is_a_function(uncertainty: str) -> None:
    model = world(uncertainty=uncertainty)
    latent, action = some_latent(model, 5), torch.linspace(-1, 1, 10).view(5, 2)
    noise = StepNoise(torch.tensor([0, 1, 2, 0, 1]), uniform(5))
    one, other = (model.step(latent, action, noise) for _ in range(2))
    for a, b in zip((*one.latent, *one[1:]), (*other.latent, *other[1:]), strict=True):
        assert torch.equal(a, b)
    assert one.reward.shape == one.cont.shape == one.uncertainty.shape == (5,)
    assert (one.reward == 0).all()  # the reward head starts at zero
    assert ((one.cont > 0) & (one.cont < 1)).all() and (one.uncertainty > 0).all()
    assert not torch.equal(one.latent.stoch, model.step(latent, action).latent.stoch)


def test_the_noise_selects_the_member_that_moves_a_row() -> None:
    model = world()
    latent, action = some_latent(model, 3), torch.zeros(3, 2)
    for m in range(3):  # member m always predicts class m
        last = model.rssm.priors.layers[-1]
        last.weight.data[m].zero_()
        last.bias.data[m] = 50 * torch.eye(4)[m].repeat(3)
    member = torch.tensor([2, 0, 1])
    stoch = model.step(latent, action, StepNoise(member, torch.full((3, 3), 0.5))).latent.stoch
    assert torch.equal(stoch.argmax(-1), member[:, None].expand(3, 3))


def test_one_member_moves_a_rollout_by_default() -> None:
    noise = world().draw_noise(200, 6)  # 200 is not divisible by three members
    assert noise.member.shape == (6, 200) and noise.uniform.shape == (6, 200, 3)
    assert (noise.member == noise.member[0]).all()
    assert noise.member.unique().tolist() == [0, 1, 2]
    per_step = world(member_per="step").draw_noise(201, 6).member
    assert (per_step != per_step[0]).any(0).float().mean() > 0.9
    assert per_step.unique().tolist() == [0, 1, 2]


def test_members_move_equal_blocks_of_rows_where_possible() -> None:
    model = world()
    noise = model.draw_noise(6, 1)
    assert noise.member is None
    latent, action = some_latent(model, 6), torch.zeros(6, 2)
    dealt = StepNoise(None, noise.uniform[0])
    named = StepNoise(torch.tensor([0, 0, 1, 1, 2, 2]), noise.uniform[0])
    other = StepNoise(torch.tensor([1, 2, 0, 2, 1, 0]), noise.uniform[0])
    for step in (model.step, model.step_unmeasured):
        one, same = step(latent, action, dealt), step(latent, action, named)
        assert_latents_close(one.latent, same.latent)
        torch.testing.assert_close(one.cont, same.cont)
    assert not torch.equal(one.latent.stoch, model.step(latent, action, other).latent.stoch)


def test_a_step_without_uncertainty_predicts_the_same() -> None:
    model = world()
    latent, action = some_latent(model, 6), torch.zeros(6, 2)
    noise = StepNoise(torch.tensor([0, 1, 2, 0, 1, 2]), uniform(6))
    measured, quick = (f(latent, action, noise) for f in (model.step, model.step_unmeasured))
    assert quick.uncertainty is None and measured.uncertainty.shape == (6,)
    assert_latents_close(measured.latent, quick.latent)
    torch.testing.assert_close(measured.cont, quick.cont)


@pytest.mark.parametrize("uncertainty", ["jsd", "probes"])
def test_an_expected_step_without_uncertainty_predicts_the_same(uncertainty: str) -> None:
    model = world(uncertainty=uncertainty)
    latent, action = some_latent(model, 6), torch.rand(6, 2)
    measured = model.step_expected(latent, action)
    quick = model.step_expected_unmeasured(latent, action)
    assert quick.uncertainty is None and measured.uncertainty.shape == (6,)
    for field in ("latent", "reward", "cont"):
        torch.testing.assert_close(getattr(quick, field), getattr(measured, field))


@pytest.mark.parametrize("uncertainty", ["jsd", "probes"])
def test_the_expected_step_is_the_mean_of_the_members(uncertainty: str) -> None:
    model = world(uncertainty=uncertainty)
    latent, action = some_latent(model, 6), torch.rand(6, 2)
    expected, measured = model.step_expected(latent, action), model.step(latent, action)
    torch.testing.assert_close(expected.latent.deter, measured.latent.deter)
    probs = mixed_probs(model.rssm.prior_logits(measured.latent.deter), model.config.unimix)
    torch.testing.assert_close(expected.latent.stoch, probs.mean(0))
    assert expected.uncertainty is not None and measured.uncertainty is not None
    torch.testing.assert_close(expected.uncertainty, measured.uncertainty)
    reward, cont = model.outcome(model.features(expected.latent))
    torch.testing.assert_close(expected.reward, reward)
    torch.testing.assert_close(expected.cont, cont)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_magnitude_of_an_action_matters(norm: str) -> None:
    """A norm after a linear map without bias would keep only the sign of a single dimension."""
    model = world(EnvSpec({"vector": ((3,), "float32")}, 1, 1), norm=norm)
    weak, strong = model.rssm.prepare_action(torch.tensor([[0.2], [0.9]]))
    assert (weak - strong).norm() > 0.3 * strong.norm()


def test_actions_are_bounded_in_value_but_not_in_gradient() -> None:
    action = torch.tensor([-3.0, -1.0, 0.5, 2.0], requires_grad=True)
    bounded = bound_action(action)
    assert bounded.tolist() == [-1.0, -1.0, 0.5, 1.0]
    bounded.sum().backward()
    assert (action.grad > 0).all() and action.grad[1:3].tolist() == [1, 1]
    model, noise = world(), StepNoise(torch.zeros(1).long(), uniform(1))
    latent = some_latent(model, 1)
    steps = [model.step(latent, torch.full((1, 2), x), noise).latent.deter for x in (1.0, 5.0)]
    assert torch.equal(*steps)


# --- free nats ------------------------------------------------------------------------------


def divergence(sharpness: float, free_nats: float = 1.0) -> tuple[WorldModel, Tensor, Tensor, dict]:
    """The terms dyn and rep at 6 rows, with the gradients attached.

    ``sharpness`` multiplies the logits of the posteriors.
    """
    model = world(free_nats=free_nats)
    torch.manual_seed(1)
    deter = torch.randn(6, 16, requires_grad=True)
    logits = torch.randn(6, 3, 4, requires_grad=True)
    terms, *_ = model._divergence(deter, logits * sharpness, torch.ones(3, 6).bool())
    return model, deter, logits, terms


def head_gradients(model: WorldModel) -> list[Tensor]:
    return [p.grad for p in model.rssm.priors.parameters()]


def test_below_the_free_nats_only_the_heads_learn() -> None:
    model, deter, logits, terms = divergence(0.1, free_nats=3.0)
    assert terms["dyn"] < 3.0 and terms["rep"].item() == pytest.approx(0.3)
    (terms["dyn"] + terms["rep"]).backward()
    assert (deter.grad == 0).all() and (logits.grad == 0).all()
    assert all(grad.flatten(1).any(1).all() for grad in head_gradients(model))


def test_above_the_free_nats_everything_learns() -> None:
    model, deter, logits, terms = divergence(20.0)
    assert terms["dyn"] > 1.0
    (terms["dyn"] + terms["rep"]).backward()
    assert deter.grad.any(1).all() and logits.grad.flatten(1).any(1).all()
    assert all(grad.flatten(1).any(1).all() for grad in head_gradients(model))


def test_free_nats_act_on_each_row() -> None:
    model = world(free_nats=1.0)
    torch.manual_seed(1)
    model.rssm.priors.layers[-1].weight.data.zero_()  # uniform priors
    model.rssm.priors.layers[-1].weight.data += 1e-3 * torch.randn(3, 8, 12)
    deter = torch.randn(2, 16, requires_grad=True)
    logits = torch.stack([torch.zeros(3, 4), 20 * torch.eye(4)[:3]]).requires_grad_()
    terms, *_ = model._divergence(deter, logits, torch.ones(3, 2).bool())
    (terms["dyn"] + terms["rep"]).backward()
    assert not deter.grad[0].any() and deter.grad[1].any()
    assert not logits.grad[0].any() and logits.grad[1].any()


def test_dyn_moves_priors_and_rep_the_posterior() -> None:
    model, deter, logits, terms = divergence(20.0)
    terms["dyn"].backward(retain_graph=True)
    assert logits.grad is None and deter.grad.any()
    model.zero_grad()
    deter.grad = None
    terms["rep"].backward()
    assert logits.grad.any() and deter.grad is None
    assert all(grad is None for grad in head_gradients(model))


def test_divergences_are_means_over_the_members_that_own_a_row() -> None:
    """Three priors are certain of classes 0, 1 and 2, and the posterior is certain of class 0."""
    model = world(free_nats=0.0, dyn_scale=1.0, rep_scale=1.0, unimix=0.04)
    last = model.rssm.priors.layers[-1]
    last.weight.data.zero_()
    last.bias.data = torch.stack([50 * torch.eye(4)[m].repeat(3) for m in range(3)])[:, None]
    logits = 50 * torch.eye(4)[0].expand(2, 3, 4)
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    terms, *_ = model._divergence(torch.zeros(2, 16), logits, mask)
    # With unimix the probabilities are 0.97 and 0.01, so the KL between different classes is
    # 0.96 ln 97 per group.
    far = 3 * 0.96 * torch.tensor(97.0).log().item()
    assert terms["dyn"].item() == pytest.approx((far / 2 + far) / 2, rel=1e-4)
    assert terms["rep"].item() == pytest.approx(far * 2 / 3, rel=1e-4)


def test_a_row_that_no_member_owns_has_no_loss() -> None:
    model = world(free_nats=0.0)
    deter, logits = torch.randn(2, 16), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, False]]).expand(3, 2)
    both = model._divergence(deter, logits, mask)[0]["dyn"]
    one = model._divergence(deter[:1], logits[:1], mask[:, :1])[0]["dyn"]
    assert both.item() == pytest.approx(one.item() / 2, rel=1e-5)
