"""``latentplan eval``: its result, its file and its films."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny import EPISODE, run_config

from latentplan.cli.main import main
from latentplan.envs.simulator import FILM_SIZE
from latentplan.evaluation.evaluate import evaluate
from latentplan.training.session import train
from latentplan.types import UserError

BLIND = """
import gymnasium
import numpy as np
from gymnasium import spaces


class Blind(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.zeros(2, np.float32), 1.0, False, self.time == 30, {}


gymnasium.register("Blind-v0", Blind)
"""


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from state vectors."""
    folder = tmp_path_factory.mktemp("states") / "walk"
    return train(run_config(folder, "steps=128", "log.inspect_every=0"))


def of_gif(path: str | Path) -> tuple[tuple[int, int], int, float]:
    """The size, the number of pictures, and the seconds of a GIF."""
    with Image.open(path) as gif:
        seconds = 0.0
        for t in range(gif.n_frames):
            gif.seek(t)
            seconds += gif.info["duration"] / 1000
        return gif.size, gif.n_frames, seconds


def test_a_run_from_state_vectors_has_a_film_in_real_time(states: Path, tmp_path: Path) -> None:
    result = evaluate(states, episodes=1, video=tmp_path / "film.gif", device="cpu")
    (width, height), count, seconds = of_gif(result["video"])
    assert width >= FILM_SIZE and height > FILM_SIZE  # with a line of text
    assert count == EPISODE / 4 + 1  # one per decision, and the start
    # A decision of four frames lasts 4/30 s. GIFs count in hundredths of a second.
    assert seconds == pytest.approx(count * 4 / 30, rel=0.05)


def test_an_image_film_is_larger_than_what_the_agent_sees(run: Path, tmp_path: Path) -> None:
    result = evaluate(run, episodes=1, planner=False, video=tmp_path / "film.gif", device="cpu")
    assert of_gif(result["video"])[0][0] >= FILM_SIZE


def test_several_policies_have_a_film_each(
    states: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = ["sample", "planner", "mean"]
    video = tmp_path / "walker.seed1.gif"
    command = ["eval", states, "--episodes", 2, "--video", video, "--policy", *policies]
    assert main([str(x) for x in command]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["policies"]) == policies and result["policy"] == "sample"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"walker.seed1-{policy}.gif" for policy in policies
    }
    for policy in policies:
        summary = result["policies"][policy]
        assert summary["video"] == str(tmp_path / f"walker.seed1-{policy}.gif")
        assert len(summary["returns"]) == 2
    gap = result["policies"]["planner"]["mean"] - result["policies"]["sample"]["mean"]
    assert result["planner_gap"] == pytest.approx(gap)


def test_the_typed_name_of_a_film_is_kept(states: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        evaluate(states, episodes=1, planner=False, video=tmp_path / f"walker.seed{seed}")
    stems = {path.name.rpartition(".")[0] for path in tmp_path.iterdir()}
    assert stems == {"walker.seed1", "walker.seed2"}


def test_the_result_is_in_the_run_folder(
    states: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(states, tmp_path / "run")
    assert main(["eval", str(folder), "--episodes", "2", "--no-planner"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((folder / "eval.json").read_text()) == printed
    described = {"task": "dummy:pixels", "checkpoint": "newest", "seed": 0, "episodes": 2}
    assert described.items() <= printed.items()
    assert len(printed["lengths"]) == 2
    assert "beside" not in printed and "planner_gap" not in printed and "video" not in printed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_can_be_evaluated(states: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(states, tmp_path / "run")
    folder.chmod(0o500)
    assert evaluate(folder, episodes=1, planner=False)["mean"]
    folder.chmod(0o700)


def test_the_scores_survive_a_file_that_cannot_be_written(
    states: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(states, tmp_path / "run")
    (folder / "eval.json").unlink(missing_ok=True)
    (folder / "eval.json").mkdir()
    assert evaluate(folder, episodes=1, planner=False)["mean"]
    assert "eval.json was not written" in caplog.text


def test_a_task_that_cannot_be_drawn_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blind.py").write_text(BLIND)
    settings = ("task=gym:Blind-v0", f"env.module={tmp_path / 'blind.py'}", "steps=128")
    folder = train(run_config(tmp_path / "run", *settings, "log.inspect_every=0"))
    capsys.readouterr()
    film = tmp_path / "films" / "film.mp4"
    assert main(["eval", str(folder), "--episodes", "1", "--video", str(film)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "gym:Blind-v0 cannot be drawn" in error
    assert not list(film.parent.iterdir())
    assert main(["eval", str(folder), "--episodes", "1"]) == 0


def test_the_planner_cannot_be_scored_and_left_out(states: Path) -> None:
    with pytest.raises(UserError, match="planner"):
        evaluate(states, policy="planner", planner=False)
    with pytest.raises(UserError, match="'best'"):
        evaluate(states, policy="best")
