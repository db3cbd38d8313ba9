"""The examples run as a reader runs them: as programs, from a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from environments import make, walk
from tiny import run_config

from latentplan import load
from latentplan.cli.main import main
from latentplan.runs import initial_weights
from latentplan.training.session import train
from latentplan.types import UserError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SHORT = [
    *("steps=150", "train.prefill=50", "train.batch=4"),
    *("log.every=50", "eval.every=100", "eval.episodes=1"),
]


def run(name: str, *arguments: str, folder: Path, launcher: Sequence[str] = ()) -> str:
    """Standard output of an example; the test fails where the example does.

    Args:
        launcher: the arguments of Python that start the example in another way.
    """
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=variables,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def printed_return(text: str) -> float:
    result = re.search(r"^return (-?[\d.]+)", text, re.MULTILINE)
    assert result, text
    return float(result[1])


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a short run of custom_env.py in it, and what was printed."""
    folder = tmp_path_factory.mktemp("point")
    return folder, run("custom_env.py", *SHORT, folder=folder)


def test_an_environment_of_ones_own_is_trained_on_and_used(point: tuple[Path, str]) -> None:
    folder, text = point
    lines = (folder / "runs/point/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[-1]["train/updates"] > 0
    scores = [row["episode/eval_score"] for row in rows if "episode/eval_score" in row]
    assert scores and all(0 < score <= 50 for score in scores)
    assert {row["episode/length"] for row in rows if "episode/length" in row} == {50.0}
    assert 0 < printed_return(text) <= 50


def test_running_the_example_again_goes_on(point: tuple[Path, str]) -> None:
    folder, _ = point
    run("custom_env.py", *SHORT, "steps=200", folder=folder)
    rows = (folder / "runs/point/metrics.jsonl").read_text().splitlines()
    assert len((json.loads((folder / "runs/point/run.json").read_text()))["sessions"]) == 2
    # As "steps" is the one thing that changed, nothing was done twice.
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == sorted(set(steps))


def test_a_trained_agent_is_used_in_ten_lines(point: tuple[Path, str]) -> None:
    folder, _ = point
    assert 0 < printed_return(run("use_agent.py", "runs/point", folder=folder)) <= 50


def test_two_processes_go_on_learning_from_the_rows_of_a_run(point: tuple[Path, str]) -> None:
    folder, _ = point
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = "data_parallel.py", "runs/point", "weights.pt", "3"
    text = run(*arguments, folder=folder, launcher=torchrun)
    assert re.search(r"^3 updates in [\d.]+ s, loss -?[\d.]+$", text, re.MULTILINE), text
    learned, before = (
        initial_weights.read(str(folder / name)) for name in ("weights.pt", "runs/point")
    )
    assert learned.frames == before.frames
    assert not torch.equal(
        learned.state["actor.net.output.weight"], before.state["actor.net.output.weight"]
    )


def test_the_loaded_agent_acts_as_a_function_of_what_it_saw(point: tuple[Path, str]) -> None:
    folder, _ = point
    agent = load(folder / "runs/point")
    action = agent.act([0.1, -0.2])
    assert action.shape == (2,) and (abs(action) <= 1).all()
    with pytest.raises(ValueError, match="shape"):
        agent.act([0.1, -0.2, 0.3])
    with pytest.raises(UserError, match=r"no config\.yaml"):
        load(folder)


def test_a_run_is_evaluated_from_elsewhere_and_after_its_file_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir(), away.mkdir()
    shutil.copy(EXAMPLES / "custom_env.py", home / "mine.py")
    monkeypatch.chdir(home)
    own = ("task=gym:Point-v0", "env.module=mine.py", "env.episode_frames=60", "env.repeat=1")
    # In workers, which start without anything that was imported before.
    train(run_config(home / "run", *own, "env.workers=true", "eval.every=64", "steps=64"))
    monkeypatch.chdir(away)
    evaluate = ["eval", str(home / "run"), "--episodes", "1"]
    assert main(evaluate) == 0
    expected = json.loads(capsys.readouterr().out)
    (home / "mine.py").rename(away / "moved.py")
    assert main(evaluate) == 2
    assert f"env.module={home / 'mine.py'} could not be imported" in capsys.readouterr().err
    assert main([*evaluate, "--module", "moved.py"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    for command in ("calibrate", "imagine", "report"):
        assert main([command, str(home / "run"), "--module", "moved.py"]) == 0


def test_a_wrapped_environment_has_the_limits_of_its_wrappers() -> None:
    kwargs = {"limit": 3, "largest_reward": 0.5, "sticky": 0.0}
    settings = {"module": str(EXAMPLES / "wrapped_env.py"), "image_size": 32, "repeat": 1}
    with make("gym:WrappedPendulum-v0", "pixels", workers=True, kwargs=kwargs, **settings) as env:
        rows, _ = walk(env, 4)
    assert [bool(row.is_first[0]) for row in rows] == [True, False, False, False, True]
    rewards = [float(row.reward[0]) for row in rows]
    assert min(rewards) == -0.5 and max(rewards) <= 0.5
    images = [row.obs["image"][0] for row in rows]
    assert images[0].mean() > 200 and (images[0] != images[1]).any()  # a white background


def test_the_environment_draws_itself_for_agents_that_see() -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import custom_env
    finally:
        sys.path.remove(str(EXAMPLES))
    env = custom_env.Point("rgb_array")
    env.reset(seed=3)
    before = env.render()
    env.step(env.action_space.high)
    assert before.shape == (64, 64, 3) and before.any()
    assert (env.render() != before).any()
