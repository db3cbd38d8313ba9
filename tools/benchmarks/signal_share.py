#!/usr/bin/env python3
"""Measure how much of an actor's gradient is signal, for each gradient estimator.

The signal share is the part of one batch's gradient that another batch confirms: the mean product
of the gradients of two batches over their mean square. It is 1 without noise, and 0 if there is
nothing but noise. Every estimator sees the same batches, models and critics, and learns nothing.

    tools/benchmarks/signal_share.py runs/cartpole --checkpoints 2000 3000 --out docs/results/signal
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentplan.agent import Agent
from latentplan.data.batches import BatchSampler
from latentplan.runs import run_folder, weights
from latentplan.runs.provenance import commit, processor
from latentplan.runs.source import RunSource
from latentplan.types import UserError

GRADIENTS = ("reinforce", "pathwise")  # pathwise is straight-through for discrete actions


def gradients(source: RunSource, gradient: str, batches: int) -> Tensor:
    """Gradients of the actor's own loss: (batches, weights of the actor)."""
    config, spec, saved = run_folder.load(source)
    config = replace(config, behavior=replace(config.behavior, gradient=gradient))
    agent = Agent(spec, config, "cpu")
    weights.restore(agent, saved["agent"], run_folder.checkpoint_path(source.folder))
    rows = []
    with run_folder.open_replay(source.folder) as replay:
        rng, train = np.random.default_rng(0), config.train
        sampler = BatchSampler(replay, train.batch, train.length, rng, torch.device("cpu"))
        for number in range(batches):
            batch, _ = sampler.sample()
            torch.manual_seed(number)
            with torch.no_grad():
                latent, _ = agent.world.observe(batch)
            losses, _ = agent.learner.losses(latent, batch)
            found = torch.autograd.grad(losses["policy"], list(agent.actor.parameters()))
            rows.append(torch.cat([x.flatten() for x in found]))
    return torch.stack(rows)


def signal_share(found: Tensor) -> float:
    """The signal share of gradients (N, W), N > 1."""
    products = found.double() @ found.double().T
    square = products.diagonal().mean()
    others = (products.sum() - products.diagonal().sum()) / (len(found) * (len(found) - 1))
    return float(others / square)


def main() -> int:
    """Measure every checkpoint, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--checkpoints", nargs="+", default=[""], help="default: the newest")
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="path of the file without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.checkpoints:
        source = RunSource(args.run, checkpoint=name)
        try:
            found = {x: gradients(source, x, args.batches) for x in GRADIENTS}
        except UserError as error:
            print(f"signal_share: {error}", file=sys.stderr)
            return 2
        means = [x.mean(0) for x in found.values()]
        row = {"checkpoint": name or "newest"}
        row |= {f"signal_share_{x}": round(signal_share(g), 4) for x, g in found.items()}
        cosine = torch.nn.functional.cosine_similarity(*means, dim=0)
        rows.append(row | {"cosine_of_the_means": round(float(cosine), 3)})
        print(rows[-1], flush=True)
    result = {
        "command": f"tools/benchmarks/signal_share.py --batches {args.batches}",
        "run": args.run.name,
        "batches": args.batches,
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "rows": rows,
    }
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
