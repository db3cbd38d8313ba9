"""Environments that use what belongs to their whole process: random generators and output."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from environments import make, walk

from latentplan.envs.simulator import episode_seed

MODULE = """
import os
import random
import sys

import gymnasium
import numpy as np
from gymnasium import spaces

print("imported")


class Global(gymnasium.Env):
    def __init__(self):
        self.observation_space = spaces.Box(-1, 1, (6,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.size = np.random.rand()  # a random task, once for all episodes
        print("built")

    def observe(self):
        os.write(1, b"written by C code")
        print("observed")
        space = self.observation_space.sample()[0], self.action_space.sample()[0]
        return np.array([np.random.rand(), random.random(), *space, self.size, self.seed])

    def reset(self, *, seed=None, options=None):
        assert seed < 2**31
        self.seed, self.time = seed / 2**31, 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        return self.observe(), 0.0, False, self.time >= 3, {}

    def close(self):
        print("closed")


gymnasium.register("Global-v0", Global)
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return str(path)


def vectors(module: str, mode: str, workers: bool, num_envs: int = 2) -> np.ndarray:
    """The vectors (9, N, 6) of more than two episodes in each of N environments."""
    settings = {"module": module, "workers": workers, "num_envs": num_envs, "repeat": 1}
    with make("gym:Global-v0", "state", mode=mode, **settings) as env:
        rows, _ = walk(env, 8)
    return np.stack([row.obs["vector"] for row in rows])


def test_episodes_do_not_depend_on_the_process_nor_on_other_environments(module: str) -> None:
    random.seed(1), np.random.seed(1)
    expected = vectors(module, "train", workers=False)
    random.seed(2), np.random.seed(2)
    np.testing.assert_array_equal(vectors(module, "train", workers=False), expected)
    np.testing.assert_array_equal(vectors(module, "train", workers=True), expected)
    np.testing.assert_array_equal(vectors(module, "train", False, 1), expected[:, :1])
    assert (vectors(module, "eval", workers=False)[0, :, :4] != expected[0, :, :4]).all()
    assert (expected[0, :, :4] != expected[4, :, :4]).all()  # the first two episodes differ
    assert (expected[0, 0, :4] != expected[0, 1, :4]).all()  # and the environments
    assert (expected[..., 4] == expected[0, 0, 4]).all()


def test_the_generators_of_this_process_stay_as_they_are(module: str) -> None:
    random.seed(5), np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5), np.random.seed(5)
    vectors(module, "train", workers=False)
    assert (random.random(), np.random.rand()) == expected


def test_seeds_have_31_bits_and_keep_their_parity(module: str) -> None:
    seeds = [episode_seed(0, "train", 0, episode) for episode in range(20)]
    assert max(seeds) >= 2**31
    with make("gym:Global-v0", "state", module=module, repeat=3) as env:
        rows, _ = walk(env, 38)
    given = [float(row.obs["vector"][0, 5]) for row in rows if row.is_first[0]]
    np.testing.assert_allclose(given, [seed % 2**31 / 2**31 for seed in seeds], rtol=1e-6)


PROGRAM = """
import json, sys
from latentplan.config.schema import EnvConfig
from latentplan.envs import make_vector
import numpy as np
if __name__ == "__main__":
    env = EnvConfig(module=sys.argv[1], workers=sys.argv[2] == "True", repeat=1)
    with make_vector("gym:Global-v0", "state", env, num_envs=1, seed=0) as environments:
        environments.reset()
        environments.step(np.zeros((1, 1)))
    print(json.dumps("the result"))
"""


@pytest.mark.parametrize("workers", [False, True])
def test_only_the_program_writes_to_standard_output(
    module: str, workers: bool, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), module, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == "the result"
    for words in ("imported", "built", "observed", "written by C code", "closed"):
        assert words in done.stderr
