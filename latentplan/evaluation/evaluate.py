"""``latentplan eval RUN``: scores of trained agents."""

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
from latentplan.runs.source import RunSource
from latentplan.runtime.device import pick_device
from latentplan.runtime.disk import require_writable
from latentplan.types import EnvSpec, Timestep, UserError, join

MOST_ENVS = 10  # environments without images that are evaluated at once in this process
CANDIDATES = 4  # candidates of plans at evaluation, for a run that was trained without a planner


class Scores(NamedTuple):
    """The result of evaluation episodes."""

    returns: list[float]  # per episode, undiscounted
    lengths: list[int]  # frames per episode
    rows: Timestep  # (T, N) all rows of the N environments, one episode after the other
    faults: int  # of the environments; each has cut an episode, which is not counted
    start: int  # index in ``rows`` at which the first counted episode of environment 0 begins

    @property
    def mean(self) -> float:
        """The mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """The standard deviation of the returns."""
        return float(np.std(self.returns))

    def film(self, spec: EnvSpec) -> np.ndarray | None:
        """The images (T, H, W, 3) uint8 of the first environment's first counted episode.

        None if the agent sees no images.
        """
        if not spec.images:
            return None
        ends = np.flatnonzero(self.rows.is_first[self.start + 1 :, 0])
        end = self.start + ends[0] + 1 if len(ends) else None
        frames: np.ndarray = self.rows.obs[spec.images[0]][self.start : end, 0]
        return frames


def run_episodes(agent: Agent, env: VectorEnv, episodes: int, mode: str = "mean") -> Scores:
    """Play whole episodes. The random generators of the caller do not change.

    Each environment plays ``ceil(episodes / env.num_envs)`` episodes, and the first ones of each
    environment are counted. Otherwise short episodes would be counted more often than long ones.
    An episode that a fault of the environment has cut is not counted, and another one is played.

    Args:
        agent: the agent.
        env: N environments.
        episodes: the number of episodes that are counted.
        mode: ``mean``, ``sample`` or ``planner``, as in :meth:`Agent.act`.

    Raises:
        TooManyFaultsError: the environments had ``env.max_faults`` faults.
    """
    device = agent.device
    episodes_per_env = -(-episodes // env.num_envs)
    returns = np.zeros((episodes_per_env, env.num_envs))
    lengths = np.zeros((episodes_per_env, env.num_envs), dtype=int)
    index = np.zeros(env.num_envs, dtype=int)  # number of the episode in each environment
    generator = torch.Generator(device).manual_seed(0)
    row, _ = env.reset()
    rows, start = [row], 0
    carry = agent.initial(env.num_envs)
    while (index < episodes_per_env).any():
        action, carry = agent.act(row.to(device), carry, mode, generator)
        row, frames = env.step(action.cpu().numpy())
        rows.append(row)
        playing = index < episodes_per_env
        current = np.minimum(index, episodes_per_env - 1), np.arange(env.num_envs)
        # A first row begins the count: the episode before it has ended or was cut.
        returns[current] = np.where(playing & row.is_first, 0.0, returns[current])
        lengths[current] = np.where(playing & row.is_first, 0, lengths[current])
        returns[current] += row.reward * playing
        lengths[current] += frames * playing
        if row.is_first[0] and index[0] == 0:
            start = len(rows) - 1
        index = np.minimum(index + env.is_last, episodes_per_env)
    return Scores(
        [float(x) for x in returns.flatten()[:episodes]],
        [int(x) for x in lengths.flatten()[:episodes]],
        join(rows, np.stack),
        env.faults,
        start,
    )


def score(
    agent: Agent,
    config: Config,
    renderer: Renderer | None,
    modes: Sequence[str],
    episodes: int,
    seed: int,
) -> Iterator[tuple[str, Scores]]:
    """Score every mode of acting on the same episodes.

    Args:
        agent: the agent.
        config: the configuration of the run.
        renderer: the renderer of the environments, or None if no images are drawn.
        modes: modes of :func:`run_episodes`.
        episodes: the number of episodes per mode.
        seed: the seed of the episodes, as in :func:`make_eval_env`.
    """
    # Many vectors are filtered as fast as one. Images take memory, and time to draw.
    in_process = 1 if renderer else MOST_ENVS
    count = min(episodes, 2 if config.env.workers else in_process)
    for mode in modes:
        # An environment never repeats an episode, so every mode needs new environments.
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
    trust: bool = False,
    checkpoint: str = "",
) -> dict[str, Any]:
    """Score the agent of a run folder.

    The actor and the planner play the same episodes. The result has the scores of ``policy``, those
    of the other one as ``beside``, and ``planner_gap``, the planner's mean minus the actor's. A run
    that was trained without a planner gets one with ``CANDIDATES`` candidates.

    Args:
        run: the run folder.
        episodes: the number of episodes.
        seed: the seed of the evaluation episodes. Training never sees them, for any seed.
        policy: ``mean`` or ``sample`` of the actor, or ``planner``.
        plan: changes of the ``plan`` section of the configuration, such as ``candidates=8``.
        video: the path of a video of the first episode, an mp4 or GIF. The default is inside the
            run folder.
        device: the device of the agent.
        module: the module that registers the user's environment, if it is not the module of
            training.
        trust: import the environment's code wherever the run folder comes from. Without it, code
            that no training run of this user has recorded is refused.
        checkpoint: a kept checkpoint, ``best`` or a number of frames, instead of the newest.

    Returns:
        Plain values, ready for JSON.

    Raises:
        UserError: the folder contains no run, the environment's code is not trusted, the checkpoint
            is damaged, no renderer works, a video is wanted although the agent sees no images, or
            the video cannot be written. These errors are raised before an episode is played.
    """
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, not {episodes}.")
    folder = Path(run)
    source = RunSource(folder, module, trust, checkpoint)
    agent, config, _, payload = run_folder.load_agent(source, pick_device(device), plan, CANDIDATES)
    path = Path(video) if video else folder / "videos" / f"eval-{payload['frames']}.mp4"
    if agent.world.spec.images:
        require_writable(path)
    elif video:
        raise UserError(
            f"The agent of {folder} sees no images (obs={config.obs}), so there is no video."
        )
    renderer = pick_renderer(config)
    policies = [policy, "mean" if policy == "planner" else "planner"]
    scores = dict(score(agent, config, renderer, policies, episodes, seed))
    requested, other = (summary(name, scores[name]) for name in policies)
    gap = requested["mean"] - other["mean"]
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
        **requested,
        "beside": other,
        "planner_gap": gap if policy == "planner" else -gap,
    }
    film = scores[policy].film(agent.world.spec)
    if film is not None:
        result["video"] = str(write_video(path, film, fps=30))
    return result


def summary(policy: str, scores: Scores) -> dict[str, Any]:
    """The scores of one policy as plain values."""
    return {
        "policy": policy,
        "returns": scores.returns,
        "lengths": scores.lengths,
        "mean": scores.mean,
        "std": scores.std,
        "faults": scores.faults,
    }


def to_json(result: Mapping[str, Any]) -> str:
    """The JSON text of a result."""
    return json.dumps(result, indent=1)
