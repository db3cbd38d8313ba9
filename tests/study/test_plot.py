"""``latentplan plot``: groups, statistics over runs, published returns, and the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import write_run

from latentplan.cli.main import main
from latentplan.inspection import plots
from latentplan.inspection.curves import band, on_common_frames
from latentplan.study import plot as plot_module
from latentplan.study.learning_curves import Curve, group, read_runs
from latentplan.study.plot import plot
from latentplan.study.published import NAMES, published, why_not_comparable
from latentplan.types import UserError

SUITE = ("dmc", "walker_walk")


def rows(*frames: int, value: float = 100.0) -> list[dict[str, Any]]:
    return [{"step": x, "episode/eval_score": value + x} for x in frames]


def curve(frames: list[int], values: list[float]) -> Curve:
    return Curve(np.array(frames), np.array(values, float))


def test_curves_are_interpolated_where_all_runs_have_values() -> None:
    one = curve([0, 10, 20, 40], [0, 10, 20, 40])
    other = curve([5, 15, 30], [50, 150, 300])
    frames, values = on_common_frames([one, other])
    assert frames.tolist() == [5, 10, 15, 20, 30]
    assert values.tolist() == [[5, 10, 15, 20, 30], [50, 100, 150, 200, 300]]
    frames, values = on_common_frames([curve([0, 5], [0, 1]), curve([6, 9], [0, 1])])
    assert frames.size == 0 and values.shape == (2, 0)


def test_the_band_of_few_runs_is_their_range() -> None:
    values = np.array([[1.0, 9.0], [5.0, 2.0], [3.0, 4.0]])
    low, high = band(values)
    assert low.tolist() == [1, 2] and high.tolist() == [5, 9]


def test_the_band_of_many_runs_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 400))  # 400 frames stand for 400 experiments with 20 runs
    low, high = band(values)
    assert np.all(low < values.mean(0)) and np.all(values.mean(0) < high)
    assert 0.88 < np.mean((low < 0) & (high > 0)) < 0.97
    assert np.mean(high - low) == pytest.approx(2 * 1.96 / np.sqrt(20), rel=0.1)


def test_a_row_that_is_written_again_at_the_same_frame_replaces_the_former(tmp_path: Path) -> None:
    lines = [*rows(10, 20), {"step": 20, "episode/eval_score": 7.0}, {"step": 30}]
    (run,) = read_runs([write_run(tmp_path / "a", lines, "task=walker_walk")])
    frames, values = run.curve("episode/eval_score")
    assert frames.tolist() == [10, 20] and values.tolist() == [110, 7]


def test_runs_are_grouped_by_everything_but_the_seed(tmp_path: Path) -> None:
    def write(name: str, *overrides: str) -> Path:
        return write_run(tmp_path / name, rows(10), *overrides)

    folders = [
        write("a", "task=walker_walk", "seed=1", "ablation=coplanner"),
        write("b", "task=walker-walk", "seed=2", "ablation=coplanner", "steps=77", "log.every=3"),
        write("c", "task=walker_walk", "seed=1", "ablation=coplanner", "plan.candidates=8"),
        write("d", "task=walker_walk", "seed=1"),
        write("e", "task=cheetah_run", "seed=1"),
        write("f", "task=gym:walker_walk", "seed=1"),
    ]
    groups = group(read_runs([*folders, folders[0]]))
    names = {
        task: {label: [run.folder.name for run in runs] for label, runs in labels.items()}
        for task, labels in groups.items()
    }
    assert names == {
        "walker_walk": {
            "coplanner, plan.candidates=4": ["a", "b"],
            "coplanner, plan.candidates=8": ["c"],
            "no ablation": ["d"],
        },
        "cheetah_run": {"no ablation": ["e"]},
        "gym:walker_walk": {"no ablation": ["f"]},
    }
    same = group(read_runs(folders[:2]))
    assert list(same["walker_walk"]) == ["coplanner"]


def test_published_returns_are_those_of_the_file() -> None:
    methods = published(SUITE)
    assert list(methods) == list(NAMES.values())
    assert [(x.frames, x.seeds, x.training) for x in methods["DreamerV3"]] == [
        (100_000, 10, True),
        (500_000, 10, True),
        (1_000_000, 10, True),
    ]
    assert methods["TD-MPC2"][0].mean == pytest.approx(463.7, abs=0.05)  # of 495.4, 437.4, 458.3
    assert methods["CURL"][-1].frames == 980_000 and not methods["CURL"][-1].training
    assert "TD-MPC2" not in published(("dmc", "ball_in_cup_catch"))
    assert published(("dmc", "ball_in_cup_catch"))["DreamerV3"]  # the file calls it cup_catch
    assert published(("gym", "walker_walk")) == {} == published(("dmc", "dog_run"))


def test_published_returns_are_compared_only_with_agents_from_pixels() -> None:
    assert why_not_comparable(SUITE, ["pixels"]) is None
    assert "obs=both and state" in (why_not_comparable(SUITE, ["state", "both", "state"]) or "")
    assert "none of this task" in (why_not_comparable(("dmc", "dog_run"), ["pixels"]) or "")
    assert why_not_comparable(("gym", "walker_walk"), ["pixels"]) is not None


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of the figures that are drawn from now on."""
    pyplot, axes = plots.pyplot(), []
    close = pyplot.close

    def keep(figure: Any = None) -> None:
        axes.extend([] if figure is None else figure.axes)
        close(figure)

    monkeypatch.setattr(pyplot, "close", keep)
    monkeypatch.setattr(plot_module, "pyplot", lambda: pyplot)
    return axes


def lines(axis: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axis.get_lines()}


def test_the_image_has_a_panel_per_task_with_means_bands_and_published_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [
        write_run(
            tmp_path / f"{task}{seed}",
            rows(*range(1000 + 100 * seed, 150_000, 10_000), value=10.0 * seed),
            *(f"task={task}", f"seed={seed}", f"obs={obs}"),
        )
        for task, obs in (("walker_walk", "pixels"), ("cheetah_run", "state"))
        for seed in range(3)
    ]
    folders.append(write_run(tmp_path / "none", [{"step": 5}], "task=walker_walk"))
    axes = drawn(monkeypatch)
    text = plot(folders, tmp_path / "new" / "x.png", with_published=True)
    path, caption = text.splitlines()
    with Image.open(path) as image:
        assert image.format == "PNG" and len(image.convert("L").getcolors(256)) > 50
    walker, cheetah = axes
    assert (walker.get_title(), cheetah.get_title()) == ("walker_walk", "cheetah_run")
    assert walker.get_xlabel() == "thousand environment frames" and walker.get_ylabel()
    mean = lines(walker)["pixels (3 runs)"]
    x, y = mean.get_data()
    assert x[0] == 1.2 and y[0] == pytest.approx(1200 + 10)  # the last run begins at 1200
    assert len(walker.collections) == 1  # the band
    v3 = lines(walker)["DreamerV3"]
    assert list(v3.get_xdata()) == [100, 500]  # up to the first ones after the runs
    assert "DreamerV3" not in lines(cheetah)
    assert "from the lowest to the highest run" in caption and "bootstrap" not in caption
    assert (
        "No published returns are shown for cheetah_run: they are of agents from pixels" in caption
    )
    assert f"left out: {tmp_path / 'none'}." in caption


def test_nothing_published_is_drawn_without_the_option_or_beside_other_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [{"step": 10, "episode/score": 1.0, "train/loss/rew": 2.0}]
    run = write_run(tmp_path / "a", points, "task=walker_walk")
    axes = drawn(monkeypatch)
    caption = plot([run], tmp_path / "x.svg", metric="train").splitlines()[1]
    assert caption == "Every line is one run."
    text = plot([run], tmp_path / "y.png", metric="train/loss/rew", with_published=True)
    assert "train/loss/rew is not a return" in text
    assert [len(axis.get_lines()) for axis in axes] == [1, 1]
    assert axes[1].get_ylabel() == "train/loss/rew"
    assert axes[0].get_lines()[0].get_marker() == "o"  # a single point is visible


def test_many_runs_get_a_bootstrap_interval(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / str(seed), rows(10, 20), "task=walker_walk", f"seed={seed}")
        for seed in range(5)
    ]
    caption = plot(folders, tmp_path / "x.png")
    assert "5 or more runs: 95\N{NO-BREAK SPACE}% bootstrap interval" in caption
    assert "lowest" not in caption


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path / "a", rows(10), "task=walker_walk"))
    for arguments, message in (
        (["--metric", "episode/eval_scroe"], "Similar names: episode/eval_score."),
        (["--metric", "planner"], "No run has a value of episode/planner_score."),
        (["--out", str(tmp_path / "x.xyz")], "must end in one of"),
        (["--out", str(tmp_path)], "must end in one of"),
        (["--out", str(tmp_path / "a" / "config.yaml" / "x.png")], "cannot be written"),
    ):
        assert main(["plot", run, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["plot", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path / "a", rows(10, 20), "task=walker_walk", "env.repeat=2"))
    out = tmp_path / "curves.png"
    assert main(["plot", run, "--out", str(out), "--published"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{out}\nEvery line is one run. Gray:") and out.exists()
    assert "published means over seeds, from pixels at action repeat 2" in text
    assert "The runs have" not in text
    other = str(write_run(tmp_path / "b", rows(10), "task=walker_walk", "env.repeat=4"))
    assert main(["plot", run, other, "--out", str(out), "--published"]) == 0
    assert "The runs have action repeat 2 and 4." in capsys.readouterr().out


def test_matplotlib_is_named_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"latentplan\[plot\]"):
        plot([tmp_path], tmp_path / "x.png")
