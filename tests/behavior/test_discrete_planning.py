"""Planning over discrete actions, on tabular problems whose best action is known by enumeration."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from latentplan.behavior.planner import plan, refine
from latentplan.nn.action_distributions import CategoricalActions
from latentplan.types import Latent, Prediction, StepNoise

STATES, HORIZON, DISCOUNT = 6, 3, 0.9
SEARCH = {"elites": 2, "width": 0.5, "horizon": HORIZON, "optimism": 0.0, "discount": DISCOUNT}


class Table:
    """A random deterministic decision process. A state is one-hot in ``deter`` (N, STATES)."""

    def __init__(self, groups: tuple[int, ...]):
        rng = torch.Generator().manual_seed(sum(groups))
        self.groups = groups
        self.joint = [
            torch.cat([torch.eye(n)[i] for n, i in zip(groups, chosen, strict=True)])
            for chosen in product(*map(range, groups))
        ]
        self.reward = torch.randn(STATES, len(self.joint), generator=rng)
        self.next = torch.randint(STATES, self.reward.shape, generator=rng)
        self.ends = torch.zeros_like(self.reward)  # 1: the action ends the episode
        self.logits = torch.randn(STATES, sum(groups), generator=rng)

    def policy(self, latent: Latent) -> CategoricalActions:
        return CategoricalActions(latent.deter @ self.logits, self.groups, 0.01)

    def step(self, latent: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        chosen = (action @ torch.stack(self.joint).T == len(self.groups)).float()
        assert (chosen.sum(-1) == 1).all(), "actions must be one-hot"
        at = latent.deter.argmax(-1), chosen.argmax(-1)
        deter = torch.eye(STATES)[self.next[at]]
        return Prediction(Latent(deter, deter), self.reward[at], 1 - self.ends[at], None)

    def best(self, policy_after: bool) -> Tensor:
        """(STATES,) the best first action, followed by the policy's mode or by the best ones."""
        mode = self.policy(self.start()).mode @ torch.stack(self.joint).T
        value = torch.zeros(STATES)
        for _ in range(HORIZON):
            q = self.reward + DISCOUNT * (1 - self.ends) * value[self.next]
            value = q.gather(1, mode.argmax(1, keepdim=True))[:, 0] if policy_after else q.amax(1)
        return q.argmax(1)

    @staticmethod
    def start() -> Latent:
        return Latent(torch.eye(STATES), torch.eye(STATES))

    def index(self, action: Tensor) -> Tensor:
        """The numbers (N,) of joint actions (N, A)."""
        return (action @ torch.stack(self.joint).T).argmax(-1)


@pytest.mark.parametrize(
    ("groups", "candidates", "rounds"),
    [((4,), 8, 1), ((2, 3), 24, 3), ((3, 4, 3), 24, 4)],
    ids=["all", "all of two groups", "cross-entropy"],
)
def test_the_search_finds_the_best_first_action(
    groups: tuple[int, ...], candidates: int, rounds: int
) -> None:
    table = Table(groups)
    torch.manual_seed(0)
    result = refine(
        table.step,
        table.policy,
        table.start(),
        **SEARCH | {"candidates": candidates, "rounds": rounds},
    )
    assert torch.equal(table.index(result.action), table.best(policy_after=True))
    assert result.refined is not None
    target = result.refined.target
    assert (target.gain >= 0).all() and (target.gain > 0).any()
    # No choice is more frequent in what the policy is taught than the best one.
    frequency = [x.amax(-1) for x in target.mean.split(groups, -1)]
    taught = (target.mean * result.action).sum(-1)
    torch.testing.assert_close(taught, torch.stack(frequency).sum(0))


def test_samples_of_the_policy_find_the_best_plan_of_several_steps() -> None:
    table = Table((3,))
    table.logits.zero_()
    torch.manual_seed(0)
    result = plan(
        table.step,
        table.policy,
        table.start(),
        candidates=600,
        horizon=HORIZON,
        optimism=0.0,
        discount=DISCOUNT,
    )
    assert torch.equal(table.index(result.action), table.best(policy_after=False))


def test_the_noise_of_a_plan_makes_its_actions_again() -> None:
    table = Table((3,))
    result = plan(
        table.step, table.policy, table.start(), candidates=5, horizon=HORIZON, optimism=0.0
    )
    latent = table.start()
    actions = result.candidates.choice.action[torch.arange(STATES), result.best]
    for h in range(HORIZON):
        action = table.policy(latent).rsample(result.noise[:, h])
        assert torch.equal(action, actions[:, h])
        latent = table.step(latent, action).latent


@pytest.mark.parametrize("searches", [False, True])
def test_a_plan_earns_nothing_after_an_end(searches: bool) -> None:
    """Action 0 earns 1 and ends the episode in a state where 100 would be earned forever. Action 1
    earns nothing now and 1 in every later step."""
    table = Table((2,))
    table.logits.zero_()
    table.logits[:, 1] = 1.0  # the search follows the mode
    table.reward = torch.tensor([[1.0, 0.0], [100.0, 100.0], [1.0, 1.0]])
    table.next = torch.tensor([[1, 2], [1, 1], [2, 2]])
    table.ends = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    start = Latent(*(torch.eye(STATES)[:1] for _ in range(2)))
    value = lambda latent: 100 * latent.deter[..., 1]  # noqa: E731
    make = refine if searches else plan
    more = {"rounds": 1, "elites": 1, "width": 0.3} if searches else {}
    torch.manual_seed(0)
    options = {"candidates": 16, "horizon": 3, "optimism": 0.0, "value": value, **more}
    chosen = make(table.step, table.policy, start, **options)
    assert table.index(chosen.action).tolist() == [1] and float(chosen.ret.max()) == 2.0
    table.ends.zero_()  # the same without an end
    chosen = make(table.step, table.policy, start, **options)
    assert table.index(chosen.action).tolist() == [0] and float(chosen.ret.max()) == 301.0
