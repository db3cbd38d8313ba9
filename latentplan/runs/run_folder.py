"""The run folder: writing its records, and loading an agent from it.

A run folder contains::

    config.yaml  run.json  checkpoint.pt  checkpoint.1.pt  metrics.jsonl  events.out.tfevents*
    videos/  replay/
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from latentplan.agent import Agent
from latentplan.config.loading import flatten, load_resolved, to_yaml
from latentplan.config.schema import Config
from latentplan.data.replay import Replay
from latentplan.envs import needs_renderer, parse_task
from latentplan.runs import checkpoint
from latentplan.runtime import disk
from latentplan.types import EnvSpec, UserError

# Keys that may change when a run continues. All other keys identify the run.
CHANGEABLE = (
    *("steps", "run_dir", "device"),
    *("env.workers", "env.timeout", "env.module", "env.renderer"),
    *("train.minutes", "train.threads", "train.compile"),
)
CHANGEABLE_SECTIONS = ("eval.", "log.")
# Prefixes of weight names in the checkpoints of earlier versions, and the present prefixes.
RENAMED_WEIGHTS = {
    "scale.": "return_scale.",
    "novelty_scale.": "uncertainty_scale.",
    "world.pictures.": "world.image_normalizers.",
}
# Prefixes of buffers that the checkpoints of earlier versions lack. They keep their first values.
ADDED_WEIGHTS = ("world.vector_normalizers.", "bonus_scale.")


def checkpoint_path(folder: Path) -> Path:
    """The newest checkpoint of a run folder. The former one is beside it."""
    return folder / "checkpoint.pt"


def record_session(folder: Path, config: Config, description: dict[str, Any]) -> None:
    """Write ``config.yaml``, and append the description of a session to ``run.json``.

    If ``env.module`` is a file, its absolute path is recorded, so that it is found from any working
    directory.

    Raises:
        UserError: a file cannot be written, or run.json is damaged. The former files stay.
    """
    record = _record(folder)
    _write_record(folder, {**record, "sessions": [*record["sessions"], description]})
    if config.env.module.endswith(".py"):
        config = _with_module(config, str(Path(config.env.module).resolve()))
    _write_text(folder / "config.yaml", to_yaml(config))


def _with_module(config: Config, module: str) -> Config:
    return replace(config, env=replace(config.env, module=module))


def record_checkpoint(folder: Path) -> None:
    """Record in ``run.json`` that a checkpoint was saved.

    If the checkpoint is missing later, the run is not started again from the beginning.

    Raises:
        UserError: run.json is damaged or cannot be written. The former file stays.
    """
    record = _record(folder)
    if not record["saved"]:
        _write_record(folder, {**record, "saved": True})


def sessions(folder: Path) -> list[dict[str, Any]]:
    """The descriptions of a run's sessions, as :func:`latentplan.runs.provenance.describe` gave.

    Raises:
        UserError: there is no run.json, or it is damaged.
    """
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is not a run folder: it has no run.json.")
    return _record(folder)["sessions"]


def _record(folder: Path) -> dict[str, Any]:
    """The content of ``run.json``: the sessions, and whether a checkpoint was ever saved."""
    path = folder / "run.json"
    if not path.exists():
        return {"saved": False, "sessions": []}
    try:
        record = json.loads(path.read_text())
        return {
            # Earlier versions did not record this. The safe answer is that a checkpoint was saved.
            "saved": record.get("saved", True),
            "sessions": [dict(session) for session in record["sessions"]],
        }
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: restore it, or remove it to continue without the record of "
            "earlier sessions."
        ) from error


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    _write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Replace a file completely or not at all, because a run without its configuration is lost."""
    try:
        with disk.replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def check_resumable(folder: Path, config: Config) -> None:
    """Check that training with ``config`` does not destroy a run in ``folder``. Writes nothing.

    A run that stopped before its first checkpoint may start again from the beginning.

    Raises:
        UserError: the folder contains another run, or a run without its checkpoint or replay.
    """
    path = checkpoint_path(folder)
    saved = checkpoint.exists(path)
    if saved or (folder / "config.yaml").exists():
        check_same(folder, config)
    if not saved and _record(folder)["saved"]:
        raise UserError(
            f"{folder} contains a run but its checkpoint is missing: put {path.name} back, or "
            "choose another run_dir."
        )
    if saved and not Replay.exists(folder / "replay"):
        raise UserError(
            f"{folder} contains a run but its replay is missing: put the folder replay back, or "
            "choose another run_dir."
        )


def identity(config: Config) -> dict[str, Any]:
    """The settings that identify a run, by dotted key. They may not change when it continues."""
    flat = flatten(asdict(config))
    # All spellings of a task are the same task, for example walker_walk and dmc:walker_walk.
    flat["task"] = ":".join(parse_task(flat["task"]))
    fixed = (k for k in flat if k not in CHANGEABLE and not k.startswith(CHANGEABLE_SECTIONS))
    return {key: flat[key] for key in fixed}


def check_same(folder: Path, config: Config) -> None:
    """Check that ``config`` describes the run in ``folder``.

    Raises:
        UserError: the configurations identify different runs. The message names the first key that
            differs.
    """
    recorded = identity(load_resolved(folder / "config.yaml"))
    for key, value in identity(config).items():
        if recorded[key] != value:
            raise UserError(
                f"{folder} contains a run with {key}={recorded[key]}, not {value}: "
                "choose another run_dir (for a study, another folder), or keep the key as it was."
            )


def with_recorded_quality(folder: Path, config: Config) -> Config:
    """``config`` with the ``env.render_quality`` of the run's first session instead of ``auto``.

    With ``auto``, another machine might draw images that the agent was not trained on.

    Raises:
        UserError: run.json is damaged.
    """
    quality = config.env.render_quality
    if quality == "auto" and needs_renderer(config.task, config.obs):
        quality = _first_choice(folder, "render_quality")
    return replace(config, env=replace(config.env, render_quality=quality))


def with_recorded_choices(folder: Path, config: Config) -> Config:
    """``config`` with the render quality and precision of the run's first session.

    They replace only values that are ``auto`` (see :func:`with_recorded_quality`).

    Raises:
        UserError: run.json is damaged.
    """
    precision = config.train.precision
    if precision == "auto":
        precision = _first_choice(folder, "precision")
    return with_recorded_quality(
        folder, replace(config, train=replace(config.train, precision=precision))
    )


def _first_choice(folder: Path, key: str) -> str:
    """The value that the run's first session chose; ``auto`` if no checkpoint was saved."""
    record = _record(folder)
    chosen = record["sessions"][0].get(key) if record["saved"] and record["sessions"] else None
    return chosen or "auto"


def _present_name(name: str) -> str:
    """The present name of a weight or buffer that an earlier version saved."""
    for old, new in RENAMED_WEIGHTS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def restore(agent: Agent, state: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's weights into an agent.

    Names of weights that an earlier version saved are mapped to the present names. An agent of a
    version without statistics of vectors goes on without them.

    Args:
        agent: receives the weights.
        state: the agent's state dictionary from the checkpoint.
        path: the checkpoint file, for error messages.

    Raises:
        UserError: the checkpoint belongs to another architecture. The agent is unchanged.
    """
    state = {_present_name(name): weight for name, weight in state.items()}
    own = agent.state_dict()
    missing = [name for name in own if name not in state and name.startswith(ADDED_WEIGHTS)]
    if any(name.startswith("world.vector_normalizers.") for name in missing):
        for normalizer in agent.world.vector_normalizers.values():
            normalizer.freeze()
    state |= {name: own[name] for name in missing}
    for name in (*own, *state):
        saved_shape = tuple(state[name].shape) if name in state else "nothing"
        own_shape = tuple(own[name].shape) if name in own else "nothing"
        if saved_shape != own_shape:
            raise UserError(
                f"{path} is a checkpoint of another architecture: "
                f"it has {saved_shape} for {name}, this agent has {own_shape}. The run.json beside "
                "it names the commit that made it."
            )
    agent.load_state_dict(state)


def load(
    folder: Path, plan: Sequence[str] = (), module: str = ""
) -> tuple[Config, EnvSpec, dict[str, Any]]:
    """Load the records and the checkpoint of a run.

    Args:
        folder: the run folder.
        plan: ``key=value`` settings of the ``plan`` section. Other settings cannot be changed.
        module: replaces ``env.module``, if the module has moved since training.

    Returns:
        The configuration, the observations and actions of the environment, and the checkpoint.

    Raises:
        UserError: the folder contains no run, both its checkpoints or run.json are damaged, or a
            key in ``plan`` is unknown.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml.")
    plan = [f"plan.{item.removeprefix('plan.')}" for item in plan]
    if plan:  # The agent is not trained further, so limits on planned imagination do not apply.
        plan.append("plan.imagine_fraction=0")
    config = load_resolved(folder / "config.yaml", plan)
    if module:
        config = _with_module(config, module)
    config = with_recorded_quality(folder, config)
    payload = checkpoint.load_newest(checkpoint_path(folder))
    return config, EnvSpec.from_dict(payload["spec"]), payload


def load_agent(
    folder: Path,
    device: torch.device | str = "cpu",
    plan: Sequence[str] = (),
    candidates: int = 1,
    module: str = "",
) -> tuple[Agent, Config, EnvSpec, dict[str, Any]]:
    """Load the agent of a run.

    Args:
        folder: the run folder.
        device: the device of the agent.
        plan: as in :func:`load`.
        candidates: the number of plan candidates if the run was trained with only one. Without a
            bonus for uncertainty, any agent can plan.
        module: as in :func:`load`.

    Returns:
        The agent, and the results of :func:`load`.

    Raises:
        UserError: as :func:`load`, or the checkpoint belongs to another architecture.
    """
    config, spec, payload = load(folder, plan, module)
    if config.plan.candidates == 1:
        config = replace(config, plan=replace(config.plan, candidates=candidates))
    agent = Agent(spec, config, device)
    restore(agent, payload["agent"], checkpoint_path(folder))
    return agent, config, spec, payload


@contextmanager
def open_replay(folder: Path) -> Iterator[Replay]:
    """Open a temporary copy of a run's replay, in its state at the checkpoint.

    Raises:
        UserError: the folder contains no run, or its replay is missing or damaged.
    """
    config, spec, payload = load(folder)
    if not (folder / "replay").is_dir():
        raise UserError(f"{folder} has no replay folder.")
    with tempfile.TemporaryDirectory() as scratch:
        # Messages name the copy, so its path has the name of the run.
        copy = Path(scratch) / folder.resolve().name / "replay"
        # Opening a replay locks it and moves its write position, so the run's own stays closed.
        shutil.copytree(folder / "replay", copy)
        replay = Replay(copy, spec, capacity=config.replay.capacity, envs=config.env.num_envs)
        try:
            replay.load_state_dict(payload["replay"])
            yield replay
        finally:
            replay.close()
