"""Faults of environments: they cost an episode, not the run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from environments import children, make, run_python
from tiny import agent_config, run_config

from latentplan.agent import Agent
from latentplan.cli.main import main
from latentplan.config.loading import to_yaml
from latentplan.data.replay import Replay
from latentplan.envs import StepInterruptedError, TooManyFaultsError, VectorEnv
from latentplan.envs.processes import WorkerEnv
from latentplan.envs.simulator import episode_seed
from latentplan.evaluation.episodes import run_episodes
from latentplan.runs import checkpoint
from latentplan.training.session import train
from latentplan.types import Timestep

# Episodes of three frames. The second episode fails at its second frame, until MARK exists.
# Rebuilt environments therefore work, except for the kinds "always", "init" and "seeds".
MODULE = """
import os, signal, time
from pathlib import Path
import gymnasium
import numpy as np
from gymnasium import spaces

KIND, MARK = os.environ["FAULT_KIND"], Path(os.environ["FAULT_MARK"])
SEEDS = [int(x) for x in os.environ.get("FAULT_SEEDS", "").split()]


class Faulty(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    resets = 0

    def __init__(self):
        if KIND == "init" and MARK.exists():
            raise OSError("no licence")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.time = seed, 0
        self.start = self.np_random.uniform()
        self.resets += 1
        if KIND == "first":
            time.sleep(1000)
        if KIND == "reset" and self.resets == 2 and not MARK.exists():
            MARK.touch()
            raise RuntimeError("boom")
        return self.observe(), {}

    def observe(self):
        return np.array([self.start, self.time / 3], np.float32)

    def step(self, action):
        self.time += 1
        observation, reward, kind = self.observe(), 1.0, ""
        if self.time == 2 and self.due():
            MARK.touch()
            kind = KIND
        if kind in ("raise", "always", "init", "seeds"):
            raise RuntimeError("boom")
        if kind == "exit":
            os._exit(7)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(1000)
        if kind == "values":
            return observation, reward, False, {}
        if kind == "shape":
            observation = np.zeros(5, np.float32)
        if kind == "nan":
            observation = observation * np.nan
        reward = {"inf": np.inf, "huge": 1e39}.get(kind, reward)
        return observation, reward, False, self.time == 3, {}

    def due(self):
        if KIND == "seeds":
            return self.seed in SEEDS
        if KIND == "always" and MARK.exists():
            return True
        return self.resets == 2 and not MARK.exists()


gymnasium.register("Faulty-v0", Faulty)
"""
TASK = "gym:Faulty-v0"
IN_PROCESS = ("raise", "values", "shape", "nan", "inf", "huge", "reset")
MakeFaulty = Callable[..., VectorEnv]


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write the module of an environment with one kind of fault, and return its path."""

    def write(kind: str, seeds: str = "") -> str:
        monkeypatch.setenv("FAULT_KIND", kind)
        monkeypatch.setenv("FAULT_MARK", str(tmp_path / "mark"))
        monkeypatch.setenv("FAULT_SEEDS", seeds)
        path = tmp_path / f"faulty_{kind}.py"
        path.write_text(MODULE)
        return str(path)

    return write


def step(env: VectorEnv, value: float = 0.5) -> tuple:
    return env.step(np.full((env.num_envs, env.spec.action_dim), value))


def is_cut(env: VectorEnv, row, frames: np.ndarray, i: int = 0) -> bool:
    """Whether environment i begins an episode in this row, and did not end the one before it."""
    assert not row.is_terminal[i] and not env.is_last[i]
    return bool(row.is_first[i]) and not row.prev_action[i].any() and not frames[i]


def resources() -> tuple[int, int, int]:
    """The numbers of worker processes, open files and threads."""
    return len(children()), psutil.Process().num_fds(), threading.active_count()


# --- one fault ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        *((kind, False) for kind in IN_PROCESS),
        *((kind, True) for kind in ("raise", "exit", "kill", "hang", "values", "huge")),
    ],
)
def test_a_fault_after_a_good_episode_begins_the_next_episode(
    kind: str, workers: bool, faulty: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"module": faulty(kind), "repeat": 1, "workers": workers}
    timeout = 4.0 if kind == "hang" else 60.0
    before = 4 if kind == "reset" else 6  # steps up to the fault
    with make(TASK, timeout=timeout, **settings) as env:
        env.reset()
        for _ in range(before - 1):
            row, _ = step(env)
        assert env.faults == 0
        row, frames = step(env)
        assert is_cut(env, row, frames)
        assert (row.reward[0], env.faults, env.episodes[0]) == (0, 1, 3)
        rest = [(step(env)[0], env.is_last[0]) for _ in range(4)]
    assert [bool(x.is_first[0]) for x, _ in rest] == [False, False, False, True]
    assert [bool(last) for _, last in rest] == [False, False, True, False]
    assert [float(x.reward[0]) for x, _ in rest] == [1, 1, 1, 0]
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and "environment 0 of gym:Faulty-v0" in warnings[0]
    with make(TASK, first_episodes=[2], **settings) as fresh:
        np.testing.assert_array_equal(fresh.reset()[0].obs["vector"], row.obs["vector"])


def test_the_other_environments_go_on(faulty: Callable) -> None:
    with make(TASK, module=faulty("exit"), repeat=1, workers=True, num_envs=2) as env:
        env.reset()
        rows = [step(env) for _ in range(6)]
        # Both reach the fault in the same step; the first one to see no mark dies.
        row, frames = rows[-1]
        assert 1 <= env.faults <= 2
        for i in range(2):
            failed = bool(row.is_first[i])
            assert (frames[i], row.reward[i], env.episodes[i]) == (
                (0, 0, 3) if failed else (1, 1, 2)
            )
        assert row.is_first.sum() == env.faults


def test_a_rebuild_that_always_fails_is_bounded(faulty: Callable) -> None:
    with make(TASK, module=faulty("init"), repeat=1, max_faults=4) as env:
        env.reset()
        with pytest.raises(TooManyFaultsError, match=r"no licence.*4 faults"):
            for _ in range(8):
                step(env)
    assert env.faults == 4


def test_a_worker_that_is_killed_leaves_nothing_behind() -> None:
    with make("dummy:count", workers=True, mode="eval", max_faults=1000) as env:
        env.reset()
        used = []
        for count in range(1, 21):
            os.kill(env._envs[0].process.pid, signal.SIGKILL)
            row, frames = env.step(np.zeros((1, 2)))
            assert is_cut(env, row, frames) and env.faults == count
            assert row.obs["vector"][0, 0] == count  # the number of the episode
            used.append(resources())
        assert len(set(used)) == 1


def test_an_environment_that_cannot_be_built_anew_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: WorkerEnv, make: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with make("dummy:count", workers=True, num_envs=2, mode="eval") as env:
        env.reset()
        os.kill(env._envs[0].process.pid, signal.SIGKILL)
        monkeypatch.setattr(WorkerEnv, "__init__", fail)
        with pytest.raises(OSError, match="Too many open files"):
            env.step(np.zeros((2, 2)))
        assert not children()


def test_a_worker_that_dies_in_the_middle_of_an_answer_costs_an_episode() -> None:
    with make("dummy:count", workers=True, mode="eval") as env:
        env.reset()
        worker = env._envs[0]
        ours, theirs = multiprocessing.Pipe()
        os.write(theirs.fileno(), b"\0\0\1\0abc")  # 256 bytes are announced, and 3 are sent
        theirs.close()
        worker._pipe.close()  # which ends the worker
        worker._pipe, worker.sources = ours, (ours, worker.process.sentinel)
        row, frames = env.step(np.zeros((1, 2)))
        assert is_cut(env, row, frames) and env.faults == 1


def test_rows_of_workers_do_not_change_later() -> None:
    """Workers write observations into memory that they use again."""
    with make("dummy:count", "both", workers=True, num_envs=2) as env:
        rows = [env.reset()[0]]
        kept = [{name: x.copy() for name, x in rows[0].obs.items()}]
        for _ in range(3):
            rows.append(step(env)[0])
            kept.append({name: x.copy() for name, x in rows[-1].obs.items()})
    with make("dummy:count", "both", num_envs=2) as env:
        same = [env.reset()[0], *(step(env)[0] for _ in range(3))]
    for row, copy, other in zip(rows, kept, same, strict=True):
        for name in ("image", "vector"):
            np.testing.assert_array_equal(row.obs[name], copy[name])
            np.testing.assert_array_equal(row.obs[name], other.obs[name])


def test_a_stop_does_not_wait_for_an_environment_that_hangs_in_its_first_reset(
    faulty: Callable,
) -> None:
    with make(TASK, module=faulty("first"), workers=True) as env:
        start = time.monotonic()
        with pytest.raises(StepInterruptedError):
            env.reset(lambda: True)
        assert time.monotonic() - start < 10
    assert not children()


def test_a_hung_worker_ends_with_its_owner(faulty: Callable) -> None:
    code = (
        "import os, sys, time, numpy as np\n"
        "from latentplan.config.schema import EnvConfig\n"
        "from latentplan.envs import make_vector\n"
        f"env = make_vector('{TASK}', 'state', EnvConfig(repeat=1, module={faulty('hang')!r}),"
        " num_envs=1, seed=0)\n"
        "env.reset()\n"
        "for _ in range(5): env.step(np.zeros((1, 1)))\n"
        "env.step_async(np.zeros((1, 1)))\n"
        "time.sleep(1)\n"
        "print(env._envs[0].process.pid)\n"
        "sys.stdout.flush()\n"
        "os._exit(0)\n"
    )
    pid = int(run_python("-c", code))
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)


def test_a_cut_episode_is_not_counted_in_an_evaluation(faulty: Callable) -> None:
    with make(TASK, module=faulty("raise"), repeat=1, mode="eval") as env:
        rows: list[Timestep] = []
        scores = run_episodes(Agent(env.spec, agent_config()), env, 3, watch=rows.append)
    assert (scores.returns, scores.lengths, scores.faults) == ([3.0] * 3, [3] * 3, 1)
    assert len(rows) == 6 + 8  # the cut one has two rows


# --- runs -----------------------------------------------------------------------------------


def faulty_run(folder: Path, module: str, *overrides: str) -> Path:
    """The file of a run of 96 frames with episodes of 3 frames."""
    items = (f"task={TASK}", f"env.module={module}", "env.repeat=1", "steps=96", "eval.every=0")
    config = run_config(
        folder / "run", *items, "train.batch=1", "train.length=4", "train.ratio=1", *overrides
    )
    (folder / "run.yaml").write_text(to_yaml(config))
    return folder / "run.yaml"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_survives_a_fault_and_its_replay_has_the_cut(
    tmp_path: Path, faulty: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, added = Replay.add, []

    def add(self: Replay, row, episode: np.ndarray) -> None:
        added.append((bool(row.is_first[0]), bool(row.is_terminal[0]), int(episode[0])))
        original(self, row, episode)

    monkeypatch.setattr(Replay, "add", add)
    folder = train([str(faulty_run(tmp_path, faulty("raise")))])
    one = [(True, False, 0), *[(False, False, 0)] * 3]
    cut = [(True, False, 1), (False, False, 1)]
    three = [(True, False, 2), *[(False, False, 2)] * 3]
    assert added[:10] == one + cut + three
    rows = metrics(folder)
    assert [row["env/faults"] for row in rows] == [1.0] * len(rows)
    assert all(row["episode/length"] == row["episode/score"] == 3 for row in rows)
    assert checkpoint.load(folder / "checkpoint.pt")["faults"] == 1


def test_too_many_faults_save_the_run_which_goes_on_past_them(
    tmp_path: Path,
    faulty: Callable,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The faults come from the seeds of three episodes, so they would come again."""
    seeds = " ".join(str(episode_seed(0, "train", 0, k) % 2**31) for k in (10, 11, 12))
    file = faulty_run(tmp_path, faulty("seeds", seeds), "env.max_faults=3")
    assert main(["train", str(file)]) == 2
    error = capsys.readouterr().err
    assert (error + caplog.text).count("Traceback (most recent call last)") == 1
    assert error.splitlines()[-1].startswith("latentplan: gym:Faulty-v0: The environment failed")
    assert "3 faults within 100 episodes (env.max_faults=3)" in error.splitlines()[-1]
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert (saved["episodes"], saved["faults"], saved["frames"]) == ([13], 3, 33)
    assert main(["train", str(file)]) == 0
    assert metrics(tmp_path / "run")[-1]["env/faults"] == 3


def test_a_run_goes_on_past_an_evaluation_with_too_many_faults(
    tmp_path: Path, faulty: Callable
) -> None:
    """The seeds of evaluations are always the same, so its faults come again with each one."""
    seeds = " ".join(str(episode_seed(0, "eval", 0, k) % 2**31) for k in range(2))
    items = ("env.max_faults=2", "eval.every=48", "eval.episodes=1", "train.prefill=8")
    file = faulty_run(tmp_path, faulty("seeds", seeds), *items)
    frames = []
    for code in (2, 2, 0):
        assert main(["train", str(file)]) == code
        frames.append(checkpoint.load(tmp_path / "run" / "checkpoint.pt")["frames"])
    assert frames == [48, 96, 96]
