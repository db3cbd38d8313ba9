"""Scoring trained agents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.envs import Renderer, VectorEnv, make_eval_env, pick_renderer
from latentplan.runs import run_folder
from latentplan.runs.logger import write_video
from latentplan.runtime.device import pick_device
from latentplan.runtime.disk import require_writable
from latentplan.types import EnvSpec, Timestep, UserError, join

CANDIDATES = 4  # of plans at test time, where a run does not say


class Scores(NamedTuple):
    """What evaluation episodes gave."""

    returns: list[float]  # per episode, undiscounted
    lengths: list[int]  # frames
    rows: Timestep  # (T, N) all rows of the N environments, one episode after the other

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns))

    def film(self, spec: EnvSpec) -> np.ndarray | None:
        """(T, H, W, 3) uint8 of the first environment's first episode, where there are pictures."""
        if not spec.images:
            return None
        ends = np.flatnonzero(self.rows.is_first[1:, 0])
        length = ends[0] + 1 if len(ends) else None
        frames: np.ndarray = self.rows.obs[spec.images[0]][:length, 0]
        return frames


def run_episodes(agent: Agent, env: VectorEnv, episodes: int, mode: str = "mean") -> Scores:
    """Play whole episodes and leave every random generator of the caller as it was.

    Each environment plays ``ceil(episodes / env.num_envs)`` episodes and the first of each are
    counted, so that short episodes are not preferred to long ones.
    """
    device = agent.device
    each = -(-episodes // env.num_envs)
    returns = np.zeros((each, env.num_envs))
    lengths = np.zeros((each, env.num_envs), dtype=int)
    index = np.zeros(env.num_envs, dtype=int)  # episode that each environment is in
    generator = torch.Generator(device).manual_seed(0)
    row, _ = env.reset()
    rows = [row]
    carry = agent.initial(env.num_envs)
    while (index < each).any():
        action, carry = agent.act(row.to(device), carry, mode, generator)
        row, frames = env.step(action.cpu().numpy())
        rows.append(row)
        playing = index < each
        where = np.minimum(index, each - 1), np.arange(env.num_envs)
        returns[where] += row.reward * playing
        lengths[where] += frames * playing
        index = np.minimum(index + env.is_last, each)
    return Scores(
        [float(x) for x in returns.flatten()[:episodes]],
        [int(x) for x in lengths.flatten()[:episodes]],
        join(rows, np.stack),
    )


def score(
    agent: Agent,
    config: Config,
    renderer: Renderer | None,
    modes: Sequence[str],
    episodes: int,
    seed: int,
) -> Iterator[tuple[str, Scores]]:
    """Every mode of acting on the same episodes, those of :func:`make_eval_env` and ``seed``."""
    count = min(episodes, 2 if config.env.workers else 1)
    for mode in modes:
        # Made anew: the next episodes of an environment are others.
        with make_eval_env(config, renderer, count, seed) as env:
            yield mode, run_episodes(agent, env, episodes, mode)


def evaluate(
    run: str | Path,
    *,
    episodes: int = 10,
    seed: int = 0,
    policy: str = "mean",
    plan: Sequence[str] = (),
    video: str | Path | None = None,
    device: str = "auto",
    module: str = "",
) -> dict[str, Any]:
    """Score the agent of a run folder; the result is plain values, ready for JSON.

    Actor and planner play the same episodes: whichever was not asked for is ``beside``, and
    ``planner_gap`` is how much more the planner got. A run that does not plan is planned with
    ``CANDIDATES``.

    Args:
        seed: of the evaluation episodes, which training never sees whatever the number.
        policy: ``mean`` or ``sample`` of the actor, or ``planner``.
        plan: changes of the ``plan`` section, ``candidates=8``.
        video: where to write the first episode as mp4 or GIF; default inside the run folder.
        module: what registers an environment of one's own, where it is elsewhere than in training.

    Raises:
        UserError: no run there, a damaged checkpoint, no working renderer; a video of an agent that
            sees no pictures, or where no file can be written. Nothing was played.
    """
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, not {episodes}.")
    folder = Path(run)
    place = pick_device(device)
    agent, config, _, payload = run_folder.load_agent(folder, place, plan, CANDIDATES, module)
    path = Path(video) if video else folder / "videos" / f"eval-{payload['frames']}.mp4"
    if agent.world.spec.images:
        require_writable(path)
    elif video:
        raise UserError(f"{folder} sees no pictures (obs={config.obs}): there is nothing to film.")
    renderer = pick_renderer(config)
    policies = [policy, "mean" if policy == "planner" else "planner"]
    scores = dict(score(agent, config, renderer, policies, episodes, seed))
    asked, beside = (summary(name, scores[name]) for name in policies)
    gap = asked["mean"] - beside["mean"]
    result = {
        "run": str(folder),
        "task": config.task,
        "obs": config.obs,
        "frames": payload["frames"],
        "updates": payload["updates"],
        "action_repeat": config.env.repeat,
        "renderer": renderer.description if renderer else "none",
        "seed": seed,
        "candidates": config.plan.candidates,
        "plan_horizon": config.plan.horizon,
        **asked,
        "beside": beside,
        "planner_gap": gap if policy == "planner" else -gap,
    }
    film = scores[policy].film(agent.world.spec)
    if film is not None:
        result["video"] = str(write_video(path, film, fps=30))
    return result


def summary(policy: str, scores: Scores) -> dict[str, Any]:
    """Plain values of one policy's episodes."""
    return {
        "policy": policy,
        "returns": scores.returns,
        "lengths": scores.lengths,
        "mean": scores.mean,
        "std": scores.std,
    }


def to_json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=1)
