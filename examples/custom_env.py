"""Train on an environment of your own: a point in a square that moves to a goal.

    python examples/custom_env.py               # train for one minute, then run one episode
    python examples/custom_env.py seed=1 steps=20000 train.minutes=5 run_dir=runs/point-1

The environment follows Gymnasium's interface. It is registered when this file is imported, and
``env.module`` names the file, so that ``latentplan train task=gym:Point-v0 obs=state
env.module=examples/custom_env.py`` trains on it from the command line too.
Worker processes import this file. Import torch only inside functions, as `main` does here.
"""

from __future__ import annotations

import logging
import sys
from typing import ClassVar

import gymnasium
import numpy as np

HOME = np.array([0.5, -0.5])


class Point(gymnasium.Env):
    """A point that observes its position (2,) and sets its velocity (2,), both in [-1, 1].

    The reward per step is exp(-2 distance to HOME), at most 1.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = np.clip(self.position + 0.2 * action, -1, 1)
        reward = np.exp(-2 * np.linalg.norm(self.position - HOME))
        return self.position.astype(np.float32), float(reward), False, False, {}

    def render(self):  # only for obs=pixels and obs=both
        image = np.zeros((64, 64, 3), np.uint8)
        for place, color in ((HOME, (0, 200, 0)), (self.position, (250, 60, 60))):
            column, row = (28 * (place + 1)).astype(int) + 4
            image[row - 4 : row + 4, column - 4 : column + 4] = color
        return image


if "Point-v0" not in gymnasium.registry:
    gymnasium.register("Point-v0", Point)

SETTINGS = [
    "task=gym:Point-v0",
    f"env.module={__file__}",
    "obs=state",
    "run_dir=runs/point",
    "steps=3000",  # environment frames; with env.repeat=1 also decisions
    "train.minutes=1",  # of wall-clock time; another call continues the run
    "env.repeat=1",
    "env.episode_frames=50",  # this environment never ends an episode itself
    # A small agent and short horizons are enough for this task.
    *("size=tiny", "train.ratio=32", "behavior.horizon=10", "behavior.discount_horizon=20"),
    *("eval.every=1000", "log.every=250"),
]


def main() -> None:
    import latentplan

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run = latentplan.train([*SETTINGS, *sys.argv[1:]])

    agent = latentplan.load(run)
    env = gymnasium.make("Point-v0", max_episode_steps=50)
    obs, _ = env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
        total, over = total + reward, terminated or truncated
    print(f"return {total:.1f} of at most 50")


if __name__ == "__main__":
    main()
