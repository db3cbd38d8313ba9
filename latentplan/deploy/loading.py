"""A trained agent in a loop of one's own: ``latentplan.load``. No planner, no environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.envs.simulator import flatten_state, is_image, to_bounds
from latentplan.runs import run_folder
from latentplan.runtime.device import pick_device
from latentplan.runtime.torchvision_compat import resize_frames
from latentplan.types import EnvSpec, Timestep

ROUNDING = 1e-4  # that an executed action may lie outside [-1, 1], back from other units


class LoadedAgent:
    """Acts in one environment at a time, by the actor's mean; no gradient is recorded.

    ::

        agent = latentplan.load("runs/quickstart")
        agent.reset()                       # at the start of every episode
        action = agent.act(obs)             # (A,) float32 in [-1, 1]
        command = agent.to_env(action)      # (A,) in the environment's own units

    One call stands for ``spec.repeat`` frames: hold the action for as many.
    """

    def __init__(self, agent: Agent, spec: EnvSpec, config: Config):
        self.agent, self.spec, self.config = agent, spec, config
        self.reset()

    def reset(self) -> None:
        """Forget the past: a new episode begins."""
        self._carry = self.agent.initial(1)
        self._action = np.zeros((1, self.spec.action_dim), np.float32)
        self._first = True
        # Posterior states are sampled: the same episode gets the same actions every time.
        self._generator = torch.Generator(self.agent.device).manual_seed(0)

    def act(self, obs: Any, executed: np.ndarray | None = None) -> np.ndarray:
        """Decide on an observation.

        Args:
            obs: what training took from the environment: a picture (height, width, 3) uint8 of any
                size, a state vector, ``{"image": ..., "vector": ...}``, or the Dict that the
                environment gives (its numbers are put in the order of their names).
            executed: (A,) in [-1, 1], what was done since the last call, where it was not what
                that call returned: a limiter's output, or a person's.

        Returns:
            (A,) float32 in [-1, 1].

        Raises:
            ValueError: the observation is not what the agent was trained on, or not finite;
                ``executed`` is no action. The agent remembers what it did before the call.
        """
        done = self._action if executed is None else self._executed(executed)
        row = Timestep(
            {name: x[None] for name, x in self._understood(obs).items()},
            self._action if self._first else done,
            np.zeros(1, np.float32),
            np.array([self._first]),
            np.zeros(1, bool),
        )
        row = row.to(self.agent.device)
        action, self._carry = self.agent.act(row, self._carry, "mean", self._generator)
        self._action, self._first = action.cpu().numpy(), False
        chosen: np.ndarray = self._action[0].copy()
        return chosen

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """An action (A,) in [-1, 1] in the units of the environment, as training scaled it.

        Raises:
            ValueError: the action has another shape or is not finite, or the run is of a version
                that did not record the bounds.
        """
        if not self.spec.action_low:
            raise ValueError("the run did not record the bounds of its environment's actions")
        low, high = np.array(self.spec.action_low), np.array(self.spec.action_high)
        return to_bounds(self._finite(action), low, high)

    def _executed(self, action: np.ndarray) -> np.ndarray:
        """(1, A), as the next row has it."""
        x = self._finite(action)
        if (abs(x) > 1 + ROUNDING).any():  # most likely in the environment's units
            raise ValueError(f"an executed action must be within [-1, 1], got {x}")
        clipped: np.ndarray = np.clip(x, -1, 1).astype(np.float32)[None]
        return clipped

    def _finite(self, action: np.ndarray) -> np.ndarray:
        x, shape = np.asarray(action, np.float64), (self.spec.action_dim,)
        if x.shape != shape or not np.isfinite(x).all():
            raise ValueError(f"an action must be finite and of shape {shape}, got {x}")
        return x

    def _understood(self, obs: Any) -> dict[str, np.ndarray]:
        """The observation as training would have recorded it."""
        found = self._named(obs)
        arrays = {}
        for name, (shape, dtype) in self.spec.obs.items():
            x = np.asarray(found[name]) if name in found else None
            if x is not None and name in self.spec.images and is_image(x.shape, x.dtype):
                x = resize_frames(x[None], shape[0])[0]
            got = "nothing" if x is None else f"{x.shape} {x.dtype}"
            numbers = x is not None and dtype == "float32" and x.dtype.kind in "fiub"
            if x is None or x.shape != shape or not (numbers or x.dtype == dtype):
                raise ValueError(f"the agent needs {name} of shape {shape} {dtype}, got {got}")
            with np.errstate(over="ignore"):
                arrays[name] = x.astype(dtype, copy=False)
            if numbers and not np.isfinite(arrays[name]).all():  # 1e300 is not, as float32
                raise ValueError(f"{name} is not finite")
        return arrays

    def _named(self, obs: Any) -> Mapping[str, Any]:
        if not isinstance(obs, Mapping):
            return {next(iter(self.spec.obs)): obs}
        if set(obs) <= set(self.spec.obs):
            return obs
        arrays = {k: np.asarray(x) for k, x in obs.items()}
        images = {k: x for k, x in arrays.items() if is_image(x.shape, x.dtype)}
        states = {k: x for k, x in arrays.items() if k not in images}
        found = {"image": next(iter(images.values()))} if images else {}
        return {**found, "vector": flatten_state(states)} if states else found


def load(run: str | Path, device: str = "cpu") -> LoadedAgent:
    """The agent of a run folder; its ``config.yaml`` and ``checkpoint.pt`` are enough.

    Raises:
        UserError: no run there, or its checkpoint is damaged or of another architecture.
    """
    agent, config, spec, _ = run_folder.load_agent(Path(run), pick_device(device))
    return LoadedAgent(agent, spec, config)
