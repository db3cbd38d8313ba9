"""Go on learning from the rows of a run, in several processes that share every update.

    torchrun --nproc-per-node 2 examples/data_parallel.py runs/quickstart weights.pt 1000
    latentplan train train.init_from=weights.pt run_dir=runs/next task=... size=...

The processes begin with the weights of the run. In each of the 1000 updates, every process draws
``train.batch`` sequences of its own from the run's replay, and all take the step of the joined
batch. The first process writes the weights. docs/scaling.md says when this pays.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from latentplan.data.batches import BatchSampler
from latentplan.runs import checkpoint, run_folder


def main(run: Path, out: Path, updates: int) -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = distributed.get_rank()
    agent, config, spec, saved = run_folder.load_agent(run, device)  # the same weights everywhere
    train = config.train
    torch.manual_seed(1 + rank)  # but each process has random numbers of its own
    rng = np.random.default_rng(1 + rank)
    with run_folder.open_replay(run) as replay:  # a copy for each process
        rows = train.context + train.length
        batches = BatchSampler(replay, train.batch, rows, rng, device, ahead=False)
        distributed.barrier()
        begin = time.monotonic()
        for _ in range(updates):
            metrics = agent.update(*batches.sample())
        seconds = time.monotonic() - begin
    if rank == 0:
        loss = sum(float(x) for name, x in metrics.items() if name.startswith("train/loss/"))
        print(f"{updates} updates in {seconds:.1f} s, loss {loss:.3f}")
        content = {"frames": saved["frames"], "agent": agent.state_dict(), "spec": spec.to_dict()}
        checkpoint.save(out, content, keep_former=False)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
