"""The cost of planning: full updates with and without it, in turns, and one planned action."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from latentplan.agent import Agent
from latentplan.bench.parts import (
    Part,
    UpdateParts,
    end_first_updates,
    random_rows,
    summary,
    time_parts,
)
from latentplan.config.loading import flatten
from latentplan.config.schema import Config
from latentplan.config.validation import check
from latentplan.training.compiling import make_agent
from latentplan.types import EnvSpec, Timestep

ACTIONS = 200  # decisions whose latency is measured
CANDIDATES = HORIZON = 4  # K and P


def planning_cost(
    config: Config, spec: EnvSpec, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Seconds of an update without planning, with planning as configured, and in faithful form.

    The faithful form plans at every step of every imagined trajectory. K and P are 4. The latency
    of one action is measured with the policy alone and with the planner.

    Raises:
        UserError: the objective is MPDP, which needs rows that are not planned.
    """
    planned = replace(config.plan, candidates=CANDIDATES, horizon=HORIZON)
    settings = {
        "none": replace(planned, candidates=1),
        "as configured": planned,
        "faithful": replace(planned, imagine_fraction=1.0, replan_every=1),
    }
    batch, episode = random_rows(spec, config.train.batch, config.train.length, device)
    parts, agents = {}, {}
    imagination = {}
    for name, plan in settings.items():
        changed = replace(config, plan=plan)
        check(flatten(asdict(changed)))  # MPDP does not allow every plan
        agent, _ = make_agent(changed, spec, device)
        end_first_updates(agent)
        agents[name] = agent
        parts[name] = Part(partial(agent.update, batch, episode), lambda: None)
        imagination[name] = UpdateParts(agent, batch, episode).parts()["imagination"]
    rows, imagined = (
        {name: summary(times) for name, times in time_parts(x, repeats, device).items()}
        for x in (parts, imagination)
    )
    base = rows["none"]["median"]
    return {
        "candidates": CANDIDATES,
        "horizon": HORIZON,
        "imagine_fraction": planned.imagine_fraction,
        "replan_every": planned.replan_every,
        "update_seconds": rows,
        "imagination_seconds": imagined,
        "ratio": {name: row["median"] / base for name, row in rows.items()},
        "action_seconds": {
            "policy": latency(agents["none"], batch),
            "planner": latency(agents["faithful"], batch),
        },
    }


def latency(agent: Agent, batch: Timestep) -> dict[str, float]:
    """Median and 99th percentile of one exploring decision of one environment, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    row = batch.map(lambda x: x[0, :1])
    carry, times = agent.initial(1), []
    for _ in range(ACTIONS + 10):
        begin = time.perf_counter()
        action, carry, *_ = agent.explore(row, carry)
        action.cpu()
        times.append(time.perf_counter() - begin)
    torch.set_num_threads(threads)
    cuts = statistics.quantiles(times[10:], n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


def describe_planning(cost: Mapping[str, Any]) -> Sequence[str]:
    """Lines of text."""
    lines = [
        f"planning, K = {cost['candidates']}, P = {cost['horizon']} (as configured: fraction "
        f"{cost['imagine_fraction']:g}, replan_every {cost['replan_every']}; actions on one core):"
    ]
    for name, row in cost["update_seconds"].items():
        lines.append(
            f"  update, {name:14} {1000 * row['median']:9.1f} ms  x {cost['ratio'][name]:.2f}"
        )
    for name, row in cost["imagination_seconds"].items():
        ratio = row["median"] / cost["imagination_seconds"]["none"]["median"]
        lines.append(f"  imagination, {name:13} {1000 * row['median']:4.1f} ms  x {ratio:.2f}")
    for name, row in cost["action_seconds"].items():
        lines.append(
            f"  action, {name:14} {1000 * row['p50']:9.1f} ms (p99 {1000 * row['p99']:.1f})"
        )
    return lines
