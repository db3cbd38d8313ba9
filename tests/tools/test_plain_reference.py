"""The plain update trains all its weights, so its time is a valid reference."""

from __future__ import annotations

import torch
from plain_reference import Reference, Widths
from tiny import BOTH, random_batch

WIDTHS = Widths(16, 3, 4, 8, 2, 1, 41, 3)


def make() -> Reference:
    torch.manual_seed(0)
    return Reference(WIDTHS, 16, 2)


def test_an_update_changes_every_weight() -> None:
    plain = make()
    with torch.no_grad():
        plain.prior[-1].weight.mul_(100)  # otherwise the KL divergence is below one free nat
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    plain.update(random_batch(3, 5, BOTH)[0])
    unchanged = [name for name, p in plain.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged and all(p.isfinite().all() for p in plain.parameters())


def test_the_loss_of_the_world_model_decreases() -> None:
    plain, batch = make(), random_batch(3, 5, BOTH)[0]
    losses = []
    for _ in range(100):
        losses.append(float(plain.world_loss(batch)[0].detach()))
        plain.update(batch)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


def test_two_hot_likelihood_is_largest_at_the_target() -> None:
    plain = make()
    logits = torch.zeros(1, 41)
    assert float(plain.expected(logits)) == 0
    sharp = logits.clone()
    sharp[0, 20] = 30.0  # the bin of zero
    assert float(plain.two_hot(sharp, torch.zeros(1))) > -1e-6
    assert float(plain.two_hot(logits, torch.tensor([3.0]))) < -3.5


def test_the_gradient_of_the_actor_passes_through_the_dynamics() -> None:
    plain, batch = make(), random_batch(3, 5, BOTH)[0]
    _, state = plain.world_loss(batch)
    actor, _ = plain.behavior_losses(state)
    (grad,) = torch.autograd.grad(actor, [plain.gates.weight])
    assert grad.abs().sum() > 0
