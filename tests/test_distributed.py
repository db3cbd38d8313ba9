"""Two ranks make the updates that one process makes with the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from tiny import differing_paths
from torch import multiprocessing

from latentplan.nn.distributed import average_over_ranks, gather_rows, mean_over_ranks

# Rounding errors grow over the updates, up to 2e-5 here. The weights move by 1e-2.
WITHIN = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank has learned, by the name of the configuration, and what it was told."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(ranks.learn_as_rank, (str(folder),), nprocs=ranks.RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks.RANKS)]


@pytest.mark.parametrize("name", ranks.configurations())
def test_ranks_learn_what_one_process_learns(learned: list[Any], name: str) -> None:
    agent = ranks.new_agent(ranks.configurations()[name])
    start = {key: x.clone() for key, x in agent.named_parameters()}
    with ranks.noise_of_ranks(agent):
        alone = ranks.learn(agent, ranks.joined)
    first, second = (results[name] for results, _ in learned)
    assert differing_paths(first["state"], second["state"]) == []  # bit for bit
    losses = [key for key in alone["metrics"][0] if key.startswith("train/loss/")]
    for key in losses:
        torch.testing.assert_close(first["metrics"][0][key], alone["metrics"][0][key])
    for key, x in alone["state"].items():
        torch.testing.assert_close(first["state"][key], x, **WITHIN, msg=f"{name}: {key}")
    moved = [(first["state"][key] - x).abs().max().item() for key, x in start.items()]
    assert sum(x > 50 * WITHIN["atol"] for x in moved) > len(moved) / 2


def test_a_bad_number_of_one_rank_stops_the_update_of_all(learned: list[Any]) -> None:
    (error, stayed), (same, stayed_too) = (parts["refused"] for _, parts in learned)
    assert "rew" in error and error == same and stayed and stayed_too


def test_ranks_tell_each_other_rows_and_means(learned: list[Any]) -> None:
    rows = torch.tensor([[0.0, 1.0], [2.0, 3.0], [10.0, 11.0], [12.0, 13.0]])
    for rank, (_, parts) in enumerate(learned):
        assert float(parts["mean"]) == 3.5
        assert torch.equal(parts["rows"], rows)
        # Averaged over the two ranks, this is the gradient of the sum of squares.
        assert torch.equal(parts["grad"] / ranks.RANKS, 2 * rows[2 * rank : 2 * rank + 2])
        assert torch.equal(parts["spreads"], torch.tensor([0.75, 3.0]))


def test_without_a_process_group_nothing_changes() -> None:
    x = torch.randn(3)
    before = x.clone()
    average_over_ranks([x])
    assert torch.equal(x, before) and gather_rows(x) is x and mean_over_ranks(x) is x
