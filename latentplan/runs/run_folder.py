"""The run folder: writing its records, and loading an agent from it.

A run folder contains::

    config.yaml  run.json  checkpoint.pt  checkpoint.1.pt  metrics.jsonl  events.out.tfevents*
    checkpoints/  videos/  replay/  console.log  lock
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latentplan.agent import Agent
from latentplan.config.loading import load_resolved, to_sealed_yaml
from latentplan.config.schema import Config
from latentplan.config.validation import check_bounds
from latentplan.data.replay import Replay
from latentplan.envs import may_need_renderer
from latentplan.runs import checkpoint, kept, payload, session_record, trust, weights
from latentplan.runs.source import RunSource, as_source
from latentplan.runtime.device import total_memory
from latentplan.types import EnvSpec, UserError

FLOAT_BYTES = 4


def checkpoint_path(folder: Path) -> Path:
    """The newest checkpoint of a run folder. The former one is beside it."""
    return folder / "checkpoint.pt"


def record_session(folder: Path, config: Config, description: dict[str, Any]) -> None:
    """Write ``config.yaml``, and append the description of a session to ``run.json``.

    If ``env.module`` is a file, its absolute path is recorded, so that it is found from any working
    directory. The files of the environment are recorded as code that this user has run.

    Raises:
        UserError: a file cannot be written, or run.json is damaged. The former files stay.
    """
    record = session_record.read(folder)
    record["sessions"].append(description)
    session_record.write(folder, record)
    if config.env.module.endswith(".py"):
        config = with_module(config, str(Path(config.env.module).resolve()))
    session_record.write_text(folder / "config.yaml", to_sealed_yaml(config))
    trust.record(config)


def with_module(config: Config, module: str) -> Config:
    """``config`` with another ``env.module``."""
    return replace(config, env=replace(config.env, module=module))


def record_checkpoint(folder: Path, frames: int) -> None:
    """Record in ``run.json`` that the newest checkpoint has ``frames`` environment frames.

    If the checkpoint is missing later, the run is not started again from the beginning. And a study
    sees that a run is complete without reading its checkpoint.

    Raises:
        UserError: run.json is damaged or cannot be written. The former file stays.
    """
    record = session_record.read(folder)
    if not record["saved"] or record["frames"] != frames:
        session_record.write(folder, {**record, "saved": True, "frames": frames})


def sessions(folder: Path) -> list[dict[str, Any]]:
    """The descriptions of a run's sessions, as :func:`latentplan.runs.provenance.describe` gave.

    Raises:
        UserError: there is no run.json, or it is damaged.
    """
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is not a run folder: it has no run.json.")
    return session_record.read(folder)["sessions"]


def with_recorded_quality(folder: Path, config: Config) -> Config:
    """``config`` with the ``env.render_quality`` of the run's first session instead of ``auto``.

    With ``auto``, another machine might draw images that the agent was not trained on.

    Raises:
        UserError: run.json is damaged.
    """
    quality = config.env.render_quality
    if quality == "auto" and may_need_renderer(config.task, config.obs):
        quality = _first_choice(folder, "env.render_quality", "render_quality")
    return replace(config, env=replace(config.env, render_quality=quality))


def with_recorded_choices(folder: Path, config: Config) -> Config:
    """``config`` with the render quality and precision of the run's first session.

    They replace only values that are ``auto`` (see :func:`with_recorded_quality`).

    Raises:
        UserError: run.json is damaged.
    """
    precision = config.train.precision
    if precision == "auto":
        precision = _first_choice(folder, "train.precision", "precision")
    return with_recorded_quality(
        folder, replace(config, train=replace(config.train, precision=precision))
    )


def _first_choice(folder: Path, key: str, name: str) -> str:
    """The value that the run's first session chose for a key; ``auto`` if no checkpoint was saved.

    Args:
        key: the key of the configuration.
        name: the name of the value in ``run.json``.
    """
    record = session_record.read(folder)
    chosen = record["sessions"][0].get(name) if record["saved"] and record["sessions"] else None
    check_bounds(key, chosen or "auto")
    return chosen or "auto"


def saved_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run, with changes that the person gives.

    Raises:
        UserError: the folder contains no run, or a value is not valid.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml.")
    return load_resolved(folder / "config.yaml", overrides)


def load(
    source: RunSource | Path, plan: Sequence[str] = ()
) -> tuple[Config, EnvSpec, dict[str, Any]]:
    """Load the records and a checkpoint of a run, whose environment may then be built.

    Args:
        source: the run; a path stands for its newest checkpoint.
        plan: ``key=value`` settings of the ``plan`` section. Other settings cannot be changed.

    Returns:
        The configuration, the observations and actions of the environment, and what
        :func:`latentplan.runs.payload.read_agent` gives.

    Raises:
        UserError: the folder contains no run, the checkpoint or run.json is damaged, a key in
            ``plan`` is unknown, or the environment's code is not trusted
            (:func:`latentplan.runs.trust.check`).
    """
    source = as_source(source)
    plan = [f"plan.{item.removeprefix('plan.')}" for item in plan]
    if plan:  # The agent is not trained further, so limits on planned imagination do not apply.
        plan.append("plan.imagine_fraction=0")
    config = saved_config(source.folder, plan)
    if source.module:
        config = with_module(config, source.module)
    if not source.trust:
        trust.check(config, source.folder, source.module)
    config = with_recorded_quality(source.folder, config)
    path = _path_of(source)
    raw = checkpoint.load(path) if source.checkpoint else checkpoint.load_newest(path)
    saved = payload.read_agent(raw, path, config.env.image_size)
    return config, saved["spec"], saved


def _path_of(source: RunSource) -> Path:
    """The file of the checkpoint that is read: a kept one, or the newest."""
    if source.checkpoint:
        return kept.path_of(source.folder, source.checkpoint)
    return checkpoint_path(source.folder)


def load_agent(
    source: RunSource | Path,
    device: torch.device | str = "cpu",
    plan: Sequence[str] = (),
    candidates: int = 1,
) -> tuple[Agent, Config, EnvSpec, dict[str, Any]]:
    """Load the agent of a run.

    Args:
        source: as in :func:`load`.
        device: the device of the agent.
        plan: as in :func:`load`.
        candidates: the number of plan candidates if the run was trained with only one. Without a
            bonus for uncertainty, any agent can plan.

    Returns:
        The agent, and the results of :func:`load`.

    Raises:
        UserError: as :func:`load`, or the checkpoint belongs to another architecture.
    """
    source = as_source(source)
    config, spec, saved = load(source, plan)
    if config.plan.candidates == 1:
        config = replace(config, plan=replace(config.plan, candidates=candidates))
    path = _path_of(source)
    weights.check_sizes(spec, config, saved["agent"], path)
    _check_plan_size(config, torch.device(device))
    agent = Agent(spec, config, device)
    weights.restore(agent, saved["agent"], path)
    return agent, config, spec, saved


def _check_plan_size(config: Config, device: torch.device) -> None:
    """Raise a UserError if the states of one plan cannot fit into the memory of the device."""
    world, plan = config.world, config.plan
    state = world.deter + world.stoch * world.classes
    if plan.candidates * plan.horizon * state * FLOAT_BYTES > total_memory(device):
        raise UserError(
            f"{device} has too little memory for plans with plan.candidates={plan.candidates} and "
            f"plan.horizon={plan.horizon}: use smaller ones, for example --plan candidates=4."
        )


def _not_files(folder: str, names: Sequence[str]) -> list[str]:
    """The names of a replay folder that are not files. A device, for example, has no end."""
    return [name for name in names if not (Path(folder) / name).is_file()]


@contextmanager
def open_replay(folder: Path) -> Iterator[Replay]:
    """Open a temporary copy of a run's replay, in its state at the newest checkpoint.

    Raises:
        UserError: the folder contains no run, or its replay is missing or damaged.
    """
    config = saved_config(folder)
    path = checkpoint_path(folder)
    raw = checkpoint.load_newest(path)
    spec = payload.read_agent(raw, path, config.env.image_size)["spec"]
    state = payload.read_replay_state(raw, path)
    if not (folder / "replay").is_dir():
        raise UserError(f"{folder} has no replay folder.")
    with tempfile.TemporaryDirectory() as scratch:
        # Messages name the copy, so its path has the name of the run.
        copy = Path(scratch) / folder.resolve().name / "replay"
        # Opening a replay locks it and moves its write position, so the run's own stays closed.
        try:
            shutil.copytree(folder / "replay", copy, ignore=_not_files)
        except shutil.Error as error:  # for example a file without permission to read
            raise UserError(f"The replay in {folder} cannot be read: {error}.") from error
        replay = Replay(
            copy,
            spec,
            capacity=config.replay.capacity,
            envs=config.env.num_envs,
            plans=config.distill.stored,
        )
        try:
            replay.load_state_dict(state)
            yield replay
        finally:
            replay.close()
