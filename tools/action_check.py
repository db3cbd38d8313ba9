#!/usr/bin/env python3
"""Compare the effects of actions in a run's world model with those in the real simulator.

    tools/action_check.py RUN

Random action sequences start at states that the run's policy visits. Each is executed in the
simulator, whose state is restored before, and imagined in the model. ``spread`` is the standard
deviation of the reward of a decision over the sequences. ``correlation`` compares the real and the
imagined differences. A model may predict its own policy perfectly and fail here. Then the policy
cannot improve by imagination. The check works only for tasks of the Control Suite.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from run_check import main
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior.imagination import follow, imagine
from latentplan.envs import parse_task, pick_renderer
from latentplan.envs.dmc import ControlSuite, build
from latentplan.runs import run_folder
from latentplan.types import Latent, StepNoise, Timestep, UserError

EPISODES, STATES, SEQUENCES, HORIZON, SAMPLES = 6, 5, 24, 10, 40
HOLD = 2  # decisions per random action; actions that change at every decision move too little
LENGTH = 110  # decisions per episode


class Real:
    """A simulator with actions in [-1, 1], each of which is repeated for ``repeat`` frames."""

    def __init__(self, simulator: ControlSuite, repeat: int):
        self.simulator, self.repeat = simulator, repeat

    def act(self, action: np.ndarray) -> float:
        """Execute an action (A,), and return the sum of its rewards."""
        command = self.simulator.actions.to_environment(action)
        return sum(self.simulator.advance(command)[0] for _ in range(self.repeat))

    def try_out(self, sequences: np.ndarray) -> np.ndarray:
        """Rewards (K, H) of action sequences (K, H, A) that start at the current state.

        The state is restored afterwards.
        """
        state = self.simulator.snapshot()
        rewards = np.zeros(sequences.shape[:2])
        for k, sequence in enumerate(sequences):
            self.simulator.restore(state)
            rewards[k] = [self.act(action) for action in sequence]
        self.simulator.restore(state)
        return rewards


@torch.no_grad()
def imagined(agent: Agent, latent: Latent, sequences: np.ndarray) -> np.ndarray:
    """Rewards (K, H) that the model predicts for action sequences (K, H, A) from one latent."""
    world, n = agent.world, len(sequences) * SAMPLES
    actions = torch.as_tensor(sequences, dtype=torch.float32).repeat(SAMPLES, 1, 1)
    start = Latent(*(x.expand(n, *x.shape[1:]) for x in latent))
    member = torch.randint(world.config.members, (1, n)).expand(HORIZON, n)
    noise = StepNoise(member, torch.rand(HORIZON, n, world.config.stoch))
    rewards = imagine(world.step_unmeasured, follow(actions), start, HORIZON, noise).reward
    return rewards.unflatten(0, (SAMPLES, -1)).mean(0).numpy()


def row(simulator: ControlSuite, action: Tensor, reward: float, first: bool) -> Timestep:
    """A row (1, ...) with the current observation of the simulator."""
    obs = {name: torch.as_tensor(x)[None] for name, x in simulator.observe().items()}
    flags = torch.tensor([first]), torch.tensor([False])
    return Timestep(obs, action, torch.tensor([reward], dtype=torch.float32), *flags)


def check(folder: Path) -> list[str]:
    """The lines of text for a run folder. No file of it is changed."""
    agent, config, spec, saved = run_folder.load_agent(folder)
    suite, name = parse_task(config.task)
    if suite != "dmc":
        raise UserError(f"{config.task} is no task of the Control Suite: its state cannot be set.")
    renderer = pick_renderer(config)
    real = Real(build(name, config.obs, config.env.image_size, renderer), spec.repeat)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    measured, predicted = [], []
    for episode in range(EPISODES):
        real.simulator.reset(int(rng.integers(2**31)), episode)
        stops = set(rng.choice(np.arange(15, LENGTH), STATES, replace=False).tolist())
        carry, action, reward = agent.initial(1), torch.zeros(1, spec.action_dim), 0.0
        for t in range(LENGTH):
            decided, carry = agent.act(row(real.simulator, action, reward, t == 0), carry)
            if t in stops:
                shape = (SEQUENCES, HORIZON // HOLD, spec.action_dim)
                sequences = rng.uniform(-1, 1, shape).repeat(HOLD, axis=1)
                measured.append(real.try_out(sequences))
                predicted.append(imagined(agent, carry, sequences))
            action, reward = decided, real.act(decided[0].numpy())
    real.simulator.close()
    # Without the mean per state, only the effects of the actions are left.
    truth, model = (np.stack(x) - np.stack(x).mean(1, keepdims=True) for x in (measured, predicted))
    lines = [
        f"{folder}: {saved['frames']} frames, {saved['updates']} updates, {len(truth)} states",
        "decisions   spread: real  model   correlation   of the sum so far",
    ]
    sums = truth.cumsum(2), model.cumsum(2)
    for k in range(HORIZON):
        each = np.corrcoef(truth[..., k].ravel(), model[..., k].ravel())[0, 1]
        both = np.corrcoef(*(x[..., k].ravel() for x in sums))[0, 1]
        spread = f"{truth[..., k].std():14.2f} {model[..., k].std():6.2f}"
        lines.append(f"{k + 1:9d}{spread}   {each:11.2f}   {both:17.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(main("action_check", __doc__, check))
