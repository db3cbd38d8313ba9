"""``latentplan.load``: a trained agent for the user's own loop, without planner or environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.envs.actions import Actions, executed
from latentplan.envs.observations import NUMBERS, ObservationError, is_image, read
from latentplan.runs import run_folder
from latentplan.runs.source import RunSource
from latentplan.runtime.device import pick_device
from latentplan.runtime.torchvision_compat import resize_frames
from latentplan.types import Entry, EnvSpec, Timestep

# Tolerance around [-1, 1] for executed actions that were converted from the environment's units.
TOLERANCE = 1e-4


class LoadedAgent:
    """An agent that acts in one environment, with the actor's mean action and without gradients.

    ::

        agent = latentplan.load("runs/quickstart")
        agent.reset()                       # at the start of every episode
        action = agent.act(obs)             # (A,) float32 in [-1, 1]
        command = agent.to_env(action)      # what the environment's step takes

    One action is for ``spec.repeat`` frames. Repeat it for as many frames in the environment.
    """

    def __init__(self, agent: Agent, spec: EnvSpec, config: Config):
        self.agent, self.spec, self.config = agent, spec, config
        self.reset()

    def reset(self) -> None:
        """Start a new episode. The agent forgets all earlier observations and actions."""
        self._carry = self.agent.initial(1)
        self._action = np.zeros((1, self.spec.action_dim), np.float32)
        self._first = True
        # Posterior states are sampled. With this seed the same episode gets the same actions.
        self._generator = torch.Generator(self.agent.device).manual_seed(0)

    def act(self, obs: Any, executed: np.ndarray | None = None) -> np.ndarray:
        """Choose an action for an observation.

        Args:
            obs: what ``reset`` or ``step`` of the environment returned, in any form that training
                understands; its images may have any size. Or the form that training records: an
                image (height, width, 3) uint8 of any size, an array of numbers, or
                ``{"image": ..., "vector": ...}``. Where training drew the image with ``render()``,
                give that image.
            executed: (A,) in [-1, 1], the action that was executed since the last call. Only needed
                if it differs from the action that the last call returned, for example because a
                limiter changed it or a person took over.

        Returns:
            (A,) float32 in [-1, 1].

        Raises:
            ValueError: the observation has another form than in training or is not finite, or
                ``executed`` is not a valid action. The state of the agent does not change then.
        """
        prev_action = self._action if executed is None else self._check_executed(executed)
        row = Timestep(
            {name: x[None] for name, x in self._convert(obs).items()},
            self._action if self._first else prev_action,
            np.zeros(1, np.float32),
            np.array([self._first]),
            np.zeros(1, bool),
        )
        row = row.to(self.agent.device)
        action, self._carry = self.agent.act(row, self._carry, "mean", self._generator)
        self._action, self._first = action.cpu().numpy(), False
        result: np.ndarray = self._action[0].copy()
        return result

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Convert an action (A,) in [-1, 1] to the environment's units, type and shape.

        The environment's action space contains the result, as in training. A discrete action
        becomes the number of the choice, or an array of numbers where there are several.

        Raises:
            ValueError: the action has another shape or is not finite, or the run is from a version
                that did not record the bounds.
        """
        if not self.spec.action_low:
            raise ValueError("the run did not record the bounds of its environment's actions")
        spec = self.spec
        kind, shape = spec.action_dtype, spec.action_shape
        actions = Actions(spec.action_low, spec.action_high, kind, shape, spec.action_groups)
        return actions.to_environment(self._check_action(action))

    def _check_executed(self, action: np.ndarray) -> np.ndarray:
        """Check an executed action (A,). The result is ``prev_action`` (1, A) of the next row."""
        x = self._check_action(action)
        if (abs(x) > 1 + TOLERANCE).any():  # probably in the environment's units
            raise ValueError(f"an executed action must be within [-1, 1], got {x}")
        groups = self.spec.action_groups
        if groups and not (x == executed(x, groups)).all():
            raise ValueError(f"an executed discrete action must be one-hot, got {x}")
        clipped: np.ndarray = executed(x, groups).astype(np.float32)[None]
        return clipped

    def _check_action(self, action: np.ndarray) -> np.ndarray:
        """Return an action as float64 (A,), and raise ValueError if it is not one."""
        x, shape = np.asarray(action, np.float64), (self.spec.action_dim,)
        if x.shape != shape or not np.isfinite(x).all():
            raise ValueError(f"an action must be finite and of shape {shape}, got {x}")
        return x

    def _convert(self, obs: Any) -> dict[str, np.ndarray]:
        """Convert an observation to the form in which training records it."""
        entries = self._name_entries(obs)
        arrays = {}
        for name, (shape, dtype) in self.spec.obs.items():
            x = np.asarray(entries[name]) if name in entries else None
            if x is not None and name in self.spec.images and is_image(x):
                x = resize_frames(x[None], shape[0])[0]
            received = "nothing" if x is None else f"{x.shape} {x.dtype}"
            if x is not None and name in self.spec.vectors:
                x = x.reshape(-1)  # as in training: an observation may have any number of axes
            numeric = x is not None and dtype == "float32" and x.dtype.kind in "fiub"
            if x is None or x.shape != shape or not (numeric or x.dtype == dtype):
                raise ValueError(f"the agent needs {name} of shape {shape} {dtype}, got {received}")
            with np.errstate(over="ignore"):
                # torch refuses negative strides, as of an image that is mirrored.
                arrays[name] = np.ascontiguousarray(x.astype(dtype, copy=False))
            if numeric and not np.isfinite(arrays[name]).all():  # 1e300 is infinite in float32
                raise ValueError(f"{name} is not finite")
        return arrays

    def _name_entries(self, obs: Any) -> Mapping[str, Any]:
        """The entries of an observation, by the names that training uses."""
        if not self.spec.entries or self._is_row(obs):
            return self._guess_entries(obs)
        try:
            return read(self.spec.entries, obs)
        except ObservationError as error:
            if isinstance(obs, Mapping) and set(self.spec.obs) <= set(obs):
                return self._guess_entries(obs)  # a row of training with an image of another size
            raise ValueError(f"the agent was given {error}") from error

    def _is_row(self, obs: Any) -> bool:
        """Whether an observation is exactly one that training recorded."""
        rows = obs if isinstance(obs, Mapping) else {next(iter(self.spec.obs)): obs}
        return set(rows) == set(self.spec.obs) and all(
            (np.shape(rows[name]), str(getattr(rows[name], "dtype", ""))) == tuple(known)
            for name, known in self.spec.obs.items()
        )

    def _guess_entries(self, obs: Any) -> Mapping[str, Any]:
        """As `_name_entries`, by the shapes of the arrays: earlier runs recorded no entries."""
        if not isinstance(obs, Mapping):
            return {next(iter(self.spec.obs)): obs}
        if set(obs) <= set(self.spec.obs):
            return obs
        entries = []
        for key, value in sorted(obs.items()):
            x = np.asarray(value)
            use = "hwc" if is_image(x) else NUMBERS
            entries.append(Entry((key,), use, x.shape, str(x.dtype)))
        try:
            return read(entries, obs)
        except ObservationError as error:
            raise ValueError(f"the agent was given {error}") from error


def load(
    run: str | Path,
    device: str = "cpu",
    *,
    module: str = "",
    trust: bool = False,
    checkpoint: str = "",
) -> LoadedAgent:
    """Load the agent of a run folder. Only ``config.yaml`` and a checkpoint are needed.

    Nothing is imported here. The configuration of the result may be given to
    :func:`latentplan.make_env`, which imports the environment's code, so that this code must be
    trusted if it exists on this machine.

    Args:
        run: the run folder.
        device: the device of the agent.
        module: the file of the environment's code, if it has moved since training.
        trust: trust the environment's code, although no training run of this user has recorded it.
        checkpoint: the name of a kept checkpoint; empty: the newest.

    Raises:
        UserError: the folder contains no run, the environment's code is not trusted, or the
            checkpoint is damaged or belongs to another architecture.
    """
    source = RunSource(Path(run), module, trust, checkpoint)
    agent, config, spec, _ = run_folder.load_agent(source, pick_device(device))
    return LoadedAgent(agent, spec, config)
