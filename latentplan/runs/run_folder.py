"""A run folder: what is written there, and how an agent comes back out of it.

::

    config.yaml  run.json  checkpoint.pt  metrics.jsonl  events.out.tfevents*  videos/  replay/
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

# What may differ when a run goes on; everything else is part of what the run *is*.
CHANGEABLE = (
    *("steps", "run_dir", "device"),
    *("env.workers", "env.timeout", "env.module", "env.renderer"),
    *("train.minutes", "train.threads", "train.compile"),
)
CHANGEABLE_SECTIONS = ("eval.", "log.")
# Beginnings of names in the checkpoints of earlier versions, and what they are now.
RENAMED_WEIGHTS = {
    "scale.": "return_scale.",
    "novelty_scale.": "uncertainty_scale.",
    "world.pictures.": "world.image_normalizers.",
}


def checkpoint_path(folder: Path) -> Path:
    return folder / "checkpoint.pt"


def write(folder: Path, config: Config, description: dict[str, Any]) -> None:
    """Record configuration and description; a run that goes on appends its description.

    A file of ``env.module`` is recorded such that it is found from any folder.

    Raises:
        UserError: they cannot be written, or run.json is damaged; what was there before stays.
    """
    record = _record(folder)
    _write_record(folder, {**record, "sessions": [*record["sessions"], description]})
    if config.env.module.endswith(".py"):
        config = _with_module(config, str(Path(config.env.module).resolve()))
    _replace(folder / "config.yaml", to_yaml(config))


def _with_module(config: Config, module: str) -> Config:
    return replace(config, env=replace(config.env, module=module))


def note_checkpoint(folder: Path) -> None:
    """Record that there is a checkpoint: a run that lost it afterwards is not started anew.

    Raises:
        UserError: it cannot be written, or run.json is damaged; what was there before stays.
    """
    record = _record(folder)
    if not record["saved"]:
        _write_record(folder, {**record, "saved": True})


def sessions(folder: Path) -> list[dict[str, Any]]:
    """The descriptions (:func:`latentplan.runs.provenance.describe`) of a run's sessions.

    Raises:
        UserError: there is no run.json, or it is damaged.
    """
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is not a run folder: it has no run.json.")
    return _record(folder)["sessions"]


def _record(folder: Path) -> dict[str, Any]:
    """What ``run.json`` holds: the sessions, and whether a checkpoint was ever saved."""
    path = folder / "run.json"
    if not path.exists():
        return {"saved": False, "sessions": []}
    try:
        record = json.loads(path.read_text())
        # Runs of earlier versions do not tell: better to refuse one that has nothing to lose.
        return {
            "saved": record.get("saved", True),
            "sessions": [dict(x) for x in record["sessions"]],
        }
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: bring it back, or remove it to go on without what it tells."
        ) from error


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    _replace(folder / "run.json", json.dumps(record, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all: without its configuration a run is lost."""
    try:
        with disk.replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def check_resumable(folder: Path, config: Config) -> None:
    """Refuse to train in a folder whose run would be lost, before anything in it is touched.

    A run that was stopped before its first checkpoint may be started anew.

    Raises:
        UserError: the run there is another one, or has lost its checkpoint or its replay.
    """
    path = checkpoint_path(folder)
    if path.exists() or (folder / "config.yaml").exists():
        check_same(folder, config)
    if not path.exists() and _record(folder)["saved"]:
        raise UserError(
            f"{folder} holds a run but its checkpoint is missing: bring {path.name} back, or "
            "choose another run_dir."
        )
    if path.exists() and not Replay.exists(folder / "replay"):
        raise UserError(
            f"{folder} holds a run but its replay is missing: bring the folder replay back, or "
            "choose another run_dir."
        )


def identity(config: Config) -> dict[str, Any]:
    """What makes a run what it is, by dotted key: all that may not change while it goes on."""
    flat = flatten(asdict(config))
    flat["task"] = ":".join(parse_task(flat["task"]))  # walker_walk and dmc:walker_walk are one
    fixed = (k for k in flat if k not in CHANGEABLE and not k.startswith(CHANGEABLE_SECTIONS))
    return {key: flat[key] for key in fixed}


def check_same(folder: Path, config: Config) -> None:
    """Refuse to go on with a run under a configuration that makes it another run.

    Raises:
        UserError: naming the first key that differs.
    """
    before = identity(load_resolved(folder / "config.yaml"))
    for key, value in identity(config).items():
        if before[key] != value:
            raise UserError(
                f"{folder} holds a run with {key}={before[key]}, not {value}: "
                "choose another run_dir (of a study: folder), or leave the key as it was."
            )


def with_recorded_quality(folder: Path, config: Config) -> Config:
    """The configuration with the ``env.render_quality`` that the run in ``folder`` began with,
    where it is ``auto``. Another machine might draw images that the agent does not know.

    Raises:
        UserError: run.json is damaged.
    """
    quality = config.env.render_quality
    if quality == "auto" and needs_renderer(config.task, config.obs):
        quality = _first_choice(folder, "render_quality")
    return replace(config, env=replace(config.env, render_quality=quality))


def with_recorded_choices(folder: Path, config: Config) -> Config:
    """As :func:`with_recorded_quality`, and with the ``train.precision`` that the run began with.

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
    """The value that a run chose in its first session; ``auto`` if it has saved nothing."""
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
    """Put a checkpoint's weights into an agent.

    Weights have their present names afterwards, whatever version wrote the checkpoint.

    Raises:
        UserError: the checkpoint is of another architecture; the agent is unchanged.
    """
    state = {_present_name(name): weight for name, weight in state.items()}
    own = agent.state_dict()
    for name in (*own, *state):
        there = tuple(state[name].shape) if name in state else "nothing"
        here = tuple(own[name].shape) if name in own else "nothing"
        if there != here:
            raise UserError(
                f"{path} is a checkpoint of another architecture: "
                f"it has {there} for {name}, this agent has {here}. Its run.json names the "
                "commit that made it."
            )
    agent.load_state_dict(state)


def load(
    folder: Path, plan: Sequence[str] = (), module: str = ""
) -> tuple[Config, EnvSpec, dict[str, Any]]:
    """The configuration of a run folder, what its agent exchanges, and its checkpoint.

    Args:
        plan: ``key=value`` of the ``plan`` section; the rest is part of what the agent is.
        module: ``env.module``, where it is not what it was in training.

    Raises:
        UserError: the folder holds no run, its checkpoint or run.json is damaged, or there is no
            such key.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml.")
    plan = [f"plan.{item.removeprefix('plan.')}" for item in plan]
    if plan:  # nobody trains with it: what may not be planned in training does not matter
        plan.append("plan.imagine_fraction=0")
    config = load_resolved(folder / "config.yaml", plan)
    if module:
        config = _with_module(config, module)
    config = with_recorded_quality(folder, config)
    payload = checkpoint.load(checkpoint_path(folder))
    return config, EnvSpec.from_dict(payload["spec"]), payload


def load_agent(
    folder: Path,
    device: torch.device | str = "cpu",
    plan: Sequence[str] = (),
    candidates: int = 1,
    module: str = "",
) -> tuple[Agent, Config, EnvSpec, dict[str, Any]]:
    """The agent of a run folder, its configuration, what it exchanges, and its checkpoint.

    Args:
        plan, module: as of :func:`load`.
        candidates: of plans, where they are one: without optimism any agent can be planned with.

    Raises:
        UserError: as :func:`load`, or the checkpoint is foreign.
    """
    config, spec, payload = load(folder, plan, module)
    if config.plan.candidates == 1:
        config = replace(config, plan=replace(config.plan, candidates=candidates))
    agent = Agent(spec, config, device)
    restore(agent, payload["agent"], checkpoint_path(folder))
    return agent, config, spec, payload


@contextmanager
def open_replay(folder: Path) -> Iterator[Replay]:
    """A copy of a run's replay as it was at the checkpoint; the run itself is not touched.

    Raises:
        UserError: the folder holds no run, or its replay is missing or damaged.
    """
    config, spec, payload = load(folder)
    if not (folder / "replay").is_dir():
        raise UserError(f"{folder} has no replay folder.")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "replay"
        shutil.copytree(folder / "replay", copy)  # opening locks, and moves the cursor
        replay = Replay(copy, spec, capacity=config.replay.capacity, envs=config.env.num_envs)
        try:
            replay.load_state_dict(payload["replay"])
            yield replay
        finally:
            replay.close()
