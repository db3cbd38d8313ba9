#!/usr/bin/env python3
"""Time an update against a plain update of the same widths, and against the machine's peak rate.

    tools/benchmarks/against_reference.py [--widths small|large|SIZE] [--repeats N] [KEY=VALUE ...]

``small`` and ``large`` are the widths of dreamerv3-torch, with its batch and horizon. The plain
update (``plain_reference.py``) has the same networks and rows, and is timed in turns with ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peak_rate import floors, peak_rates
from plain_reference import Reference, Widths

from latentplan.bench.parts import FULL, Part, UpdateParts, random_rows, summary, time_parts
from latentplan.config.loading import load
from latentplan.config.schema import Config
from latentplan.envs import make_train_env, pick_renderer
from latentplan.runs.provenance import commit, processor
from latentplan.runtime.allocator import configure_malloc
from latentplan.runtime.device import pick_device
from latentplan.training.compiling import make_agent
from latentplan.types import UserError

PLAIN = "plain reference"


def same_work(deter: int, stoch: int, depth: int, units: int) -> list[str]:
    """Overrides for given widths, with the batch, horizon and rows of dreamerv3-torch.

    Every frame is decoded, and every row is a start. All other values are those of ``size=cpu``.
    """
    values = {
        **{"size": "cpu", "obs": "pixels", "env.image_size": 64},
        **{"train.batch": 16, "train.length": 64, "behavior.horizon": 15},
        **{"behavior.starts_fraction": 1.0, "world.decode_fraction": 1.0},
        **{"world.layers": 2, "behavior.layers": 2, "world.deter": deter, "world.depth": depth},
        **{"world.stoch": stoch, "world.classes": stoch},
        **{f"world.{key}": units for key in ("hidden", "units", "member_hidden")},
        **{"behavior.units": units, "world.bins": 255, "behavior.bins": 255},
    }
    return [f"{key}={value}" for key, value in values.items()]


WIDTHS = {"small": same_work(128, 16, 16, 128), "large": same_work(512, 32, 32, 512)}


def compare(config: Config, repeats: int) -> dict[str, Any]:
    """Time the parts of our update, and the plain update, in turns.

    Raises:
        UserError: the configuration has no images, or no renderer works.
    """
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    configure_malloc()
    device = pick_device(config.device)
    with make_train_env(config, pick_renderer(config)) as env:
        spec = env.spec
    if not spec.images:
        raise UserError("The plain update needs images: set obs=pixels.")
    agent, compiled = make_agent(config, spec, device)
    batch, episode = random_rows(spec, config.train.batch, config.train.length, device)
    parts = UpdateParts(agent, batch, episode).parts()
    torch.manual_seed(config.seed)
    widths = Widths.from_config(config)
    plain = Reference(widths, config.env.image_size, spec.action_dim).to(device)
    timed = {**parts, PLAIN: Part(lambda: plain.update(batch), lambda: None)}
    seconds = time_parts(timed, repeats, device)
    rates = peak_rates(device)
    medians = {name: summary(times) for name, times in seconds.items()}
    return {
        "commit": commit(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "repeats": repeats,
        "seconds": medians,
        "ratio": medians[FULL]["median"] / medians[PLAIN]["median"],
        "peak_gflops": {dtype: rate / 1e9 for dtype, rate in rates.items()},
        "floors": floors(parts, seconds, rates),
    }


def describe(name: str, result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{name}: {result['processor']}, {result['threads']} threads"]
    for part, row in result["seconds"].items():
        floor = result["floors"].get(part)
        rate = f"{floor['gflop']:10.1f} GFLOP{floor['times_floor']:8.1f} x peak" if floor else ""
        lines.append(f"  {part:16}{1000 * row['median']:10.1f} ms{rate}")
    lines.append(f"  full update / plain reference {result['ratio']:.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("items", nargs="*", metavar="KEY=VALUE")
    parser.add_argument(
        "--widths", default="small", help="small (default), large, or a size of configs/size"
    )
    parser.add_argument("--repeats", type=int, default=7, help="default: 7")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the result to this file"
    )
    args = parser.parse_intermixed_args(argv)
    try:
        overrides = WIDTHS.get(args.widths, [f"size={args.widths}"])
        result = compare(load(overrides=[*overrides, *args.items]), args.repeats)
    except UserError as error:
        print(f"against_reference: {error}", file=sys.stderr)
        return 2
    print(describe(args.widths, result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
