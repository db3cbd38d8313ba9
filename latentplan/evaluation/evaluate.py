"""``latentplan eval RUN``: scores of trained agents."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentplan.envs import VectorEnv, pick_renderer
from latentplan.envs.simulator import Picture
from latentplan.evaluation.episodes import Camera, Scores, score
from latentplan.runs import run_folder
from latentplan.runs.source import RunSource
from latentplan.runs.stamp import stamp
from latentplan.runs.video import tagged, write_video
from latentplan.runtime.device import pick_device
from latentplan.runtime.disk import replacing, require_writable
from latentplan.types import Timestep, UserError, shown

log = logging.getLogger("latentplan")
POLICIES = ("mean", "sample", "planner")
CANDIDATES = 4  # candidates of plans at evaluation, for a run that was trained without a planner


def evaluate(
    run: str | Path,
    *,
    episodes: int = 10,
    seed: int = 0,
    policy: str | Sequence[str] = "mean",
    planner: bool = True,
    plan: Sequence[str] = (),
    video: str | Path | None = None,
    device: str = "auto",
    module: str = "",
    trust: bool = False,
    checkpoint: str = "",
) -> dict[str, Any]:
    """Score the agent of a run folder, and write the result to RUN/eval.json.

    The actor and the planner play the same episodes. The result has the scores of ``policy``, those
    of the other one as ``beside``, and ``planner_gap``, the planner's mean minus the actor's. A run
    that was trained without a planner gets one with ``CANDIDATES`` candidates.

    The film of a policy shows its first episode in the time of the simulation. Its camera does not
    depend on what the agent sees, so runs from state vectors have films too.

    Args:
        run: the run folder.
        episodes: the number of episodes.
        seed: the seed of the evaluation episodes. Training never sees them, for any seed. Episode k
            is the same for any number of episodes.
        policy: ``mean`` or ``sample`` of the actor, or ``planner``; or several of them, whose
            scores the result has under ``policies``.
        planner: whether the planner is scored beside the actor.
        plan: changes of the ``plan`` section of the configuration, such as ``candidates=8``.
        video: the path of a video of the first episode of ``policy``, an mp4 or GIF. Several
            policies have a file each, with their names. The default is inside the run folder for an
            agent that sees images, and no video for another one.
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
            is damaged, no renderer works, a video is wanted of a task that cannot be drawn, or the
            video cannot be written. These errors are raised before an episode is played.
    """
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, not {episodes}.")
    asked = list(dict.fromkeys([policy] if isinstance(policy, str) else policy))
    if not asked or not set(asked) <= set(POLICIES):
        raise UserError(f"policy must be of {', '.join(POLICIES)}, not {shown(policy)}.")
    if "planner" in asked and not planner:
        raise UserError("The planner cannot be both scored and left out: name another policy.")
    other = _counterpart(asked[0], planner)
    folder = Path(run)
    source = RunSource(folder, module, trust, checkpoint)
    agent, config, _, payload = run_folder.load_agent(source, pick_device(device), plan, CANDIDATES)
    path = Path(video) if video else folder / "videos" / f"eval-{payload['frames']}.mp4"
    paths = {name: tagged(path, name) if len(asked) > 1 else path for name in asked}
    if not (video or agent.world.spec.images):
        paths = {}
    for file in paths.values():
        require_writable(file)
    named = folder.absolute().name, payload["frames"]
    cameras = {name: _camera(*named, name, required=bool(video)) for name in paths}
    renderer = pick_renderer(config, bool(paths))
    policies = [*asked, *(name for name in [other] if name is not None and name not in asked)]
    summaries = {}
    for name, scores in score(
        agent, config, renderer, policies, episodes, seed, cameras=cameras, draws=True
    ):
        summaries[name] = summary(name, scores)
        if scores.film is not None:
            written = write_video(paths[name], scores.film.frames, scores.film.fps)
            summaries[name]["video"] = str(written)
    seen = renderer if agent.world.spec.images else None
    result = {
        "run": str(folder),
        "task": config.task,
        "obs": config.obs,
        "checkpoint": checkpoint or "newest",
        "frames": payload["frames"],
        "updates": payload["updates"],
        "action_repeat": config.env.repeat,
        "renderer": seen.description if seen else "none",
        "seed": seed,
        "episodes": episodes,
        "candidates": config.plan.candidates,
        "plan_horizon": config.plan.horizon,
        **summaries[asked[0]],
    }
    if other is not None:
        gap = summaries[asked[0]]["mean"] - summaries[other]["mean"]
        result |= {
            "beside": summaries[other],
            "planner_gap": gap if asked[0] == "planner" else -gap,
        }
    if len(asked) > 1:
        result["policies"] = summaries
    _write(result, folder / "eval.json")
    return result


def _counterpart(policy: str, planner: bool) -> str | None:
    """The policy that is scored beside ``policy``: the planner beside the actor, or the actor."""
    if policy == "planner":
        return "mean"
    return "planner" if planner else None


def _camera(run: str, frame: int, policy: str, *, required: bool) -> Camera:
    """A camera that draws the scene, for any observations of the agent, and stamps it.

    Args:
        run, frame, policy: as of :func:`latentplan.runs.stamp.stamp`.
        required: whether it is an error that the task cannot be drawn.
    """

    def camera(env: VectorEnv, row: Timestep) -> Picture | None:
        try:
            picture = env.draw(0)
        except UserError as error:
            if required:
                raise
            log.warning("no film: %s", error)
            return None
        return picture._replace(image=stamp(picture.image[None], run, frame, policy)[0])

    return camera


def _write(result: Mapping[str, Any], path: Path) -> None:
    """Write a result to a file that is complete at any time. The scores are not lost without it."""
    try:
        with replacing(path) as file:
            file.write((to_json(result) + "\n").encode())
    except OSError as error:
        log.warning("%s was not written: %s.", path, error.strerror)


def summary(policy: str, scores: Scores) -> dict[str, Any]:
    """The scores of one policy as plain values, with successes where the task tells of them."""
    values: dict[str, Any] = {
        "policy": policy,
        "returns": scores.returns,
        "lengths": scores.lengths,
        "mean": scores.mean,
        "std": scores.std,
        "faults": scores.faults,
    }
    if scores.successes is not None:
        values["successes"] = scores.successes
        values["success_rate"] = sum(scores.successes) / len(scores.successes)
    return values


def to_json(result: Mapping[str, Any]) -> str:
    """The JSON text of a result."""
    return json.dumps(result, indent=1)
