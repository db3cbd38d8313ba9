"""``latentplan imagine`` and ``latentplan report``, from the checkpoints of small runs."""

from __future__ import annotations

import base64
import datetime
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import run_config

from latentplan.cli.main import main
from latentplan.config.loading import load_resolved
from latentplan.inspection.curves import Curve, draw_curves, read_curve
from latentplan.inspection.visualizations import CAPTIONS
from latentplan.runs import run_folder
from latentplan.study.html_report import _panels, _returns
from latentplan.training.session import train

PLANNED = ("plan.candidates=3", "plan.horizon=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run with images and a planner, and a run with vectors and without a planner."""
    folder = tmp_path_factory.mktemp("runs")
    quiet = ("env.repeat=2", "log.inspect_every=0")
    train(run_config(folder / "images", "obs=pixels", *quiet, *PLANNED))
    train(run_config(folder / "vectors", "eval.episodes=6", *quiet))
    return [folder / "images", folder / "vectors"]


def test_imagine_writes_every_visualization(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["imagine", str(runs[0])]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"].keys() == CAPTIONS.keys() and result["frames"] == 256
    for name, path in result["files"].items():
        subfolder = "imagine/calibration" if name == "calibration" else "imagine/videos"
        assert Path(path).parent == runs[0] / subfolder and Path(path).stat().st_size > 500
    with Image.open(result["files"]["plan_fan"]) as fan:
        assert (np.asarray(fan) == (255, 225, 25)).all(-1).any(), "one candidate has a yellow frame"
    events = EventAccumulator(str(runs[0] / "imagine")).Reload()
    films = CAPTIONS.keys() - {"calibration"}
    assert set(events.Tags()["images"]) == {f"imagination/{name}" for name in films}
    (points,) = (runs[0] / "imagine").rglob("tensors.tsv")
    header, *rows = points.with_name("metadata.tsv").read_text().splitlines()
    assert header.split("\t")[0] == "return" and len(rows) == len(points.read_text().splitlines())
    assert points.with_name("sprite.png").exists()


def test_imagine_explains_missing_images(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["imagine", str(runs[1]), "--out", str(tmp_path / "seen")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "no images" in result["note"] and "--plan candidates=4" in result["planner"]
    assert "planner_against_policy" not in result["files"]
    films = {name for name, path in result["files"].items() if not path.endswith(".png")}
    assert films == {"dream_against_reality"}  # the scene can be drawn, for any observations
    more = ["--out", str(tmp_path / "more"), "--plan", "candidates=4"]
    assert main(["imagine", str(runs[1]), *more]) == 0
    assert "planner_against_policy" in json.loads(capsys.readouterr().out)["files"]


def test_imagine_draws_the_same_twice(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        assert main(["imagine", str(runs[1]), "--out", str(tmp_path / name)]) == 0
    for path in sorted((tmp_path / "one" / "videos").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "videos" / path.name).read_bytes()


def test_training_calibrates_on_evaluation_episodes(runs: list[Path]) -> None:
    lines = [json.loads(x) for x in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    known = [row for row in lines if "calibration/latent_5" in row]
    assert known and all("episode/eval_score" in row for row in known)
    assert all(-1 <= row["calibration/latent_5"] <= 1 for row in known)
    # One episode has too few windows for a ranking.
    assert "calibration/latent_5" not in (runs[0] / "metrics.jsonl").read_text()


class Page(HTMLParser):
    """The elements of an HTML page, and the sources that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_is_one_file_without_links(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "page.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    text = out.read_text()
    page = Page(text)
    title = f"latentplan: dummy:pixels, {datetime.date.today().isoformat()}"
    assert f"<title>{title}</title>" in text and f"<h1>{title}</h1>" in text
    assert len(page.sources) >= 10 and all(x.startswith("data:") for x in page.sources)
    for source in page.sources:
        content = base64.b64decode(source.split("base64,")[1])
        assert content[:4] in (b"\x89PNG", b"GIF8") or content[4:8] == b"ftyp"
    assert "http" not in re.sub(r"<pre>.*?</pre>|base64,[^\"]*", "", text, flags=re.S)
    for run in runs:
        assert f"<h2>{run.name}</h2>" in text and f"latentplan eval {run}" in text
        assert f"seed: {load_resolved(run / 'config.yaml').seed}" in text


@pytest.mark.parametrize("score", [50.0, -50.0])
def test_a_run_with_a_single_evaluation_is_seen_in_the_figure(score: float) -> None:
    pytest.importorskip("matplotlib")
    buffer = io.BytesIO()
    curve = Curve({"run": "short"}, [{"frame": 3000, "seconds": 60, "mean": score}])
    draw_curves({"dummy:pixels": {"none": [curve]}}, buffer)
    image = np.asarray(Image.open(buffer).convert("RGB"))
    beside_the_legend = image[:, : image.shape[1] * 2 // 3]
    assert (beside_the_legend == (31, 119, 180)).all(-1).any()


def test_only_runs_that_differ_in_the_seed_share_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, dict[str, list[Curve]]] = {}
    monkeypatch.setattr(
        "latentplan.study.html_report.draw_curves",
        lambda panels, buffer, title: drawn.update(panels),
    )
    eight = ["ablation=coplanner", "plan.candidates=8"]
    runs = {
        "a": ["seed=1", "ablation=dreamer"],
        "b": ["seed=2", "ablation=dreamer", "steps=512"],
        "c": ["ablation=dreamer", "obs=pixels"],
        "d": ["ablation=dreamer", "obs=pixels", "size=cpu"],
        "e": eight[:1],
        "f": eight,
        "g": [*eight, "task=dummy:count"],
    }
    curves = {}
    for name, overrides in runs.items():
        config = run_config(tmp_path / name, *overrides)
        run_folder.record_session(tmp_path / name, config, {})
        (tmp_path / name / "metrics.jsonl").touch()
        curves[tmp_path / name] = read_curve(tmp_path / name)
    _returns(_panels(curves), "title")
    assert {
        task: {
            label: "".join(x.description["run"] for x in group) for label, group in groups.items()
        }
        for task, groups in drawn.items()
    } == {
        "dummy:pixels": {
            "dreamer obs=state": "ab",
            "dreamer obs=pixels size=tiny": "c",
            "dreamer obs=pixels size=cpu": "d",
            "coplanner plan.candidates=4": "e",
            "coplanner plan.candidates=8": "f",
        },
        "dummy:count": {"coplanner": "g"},
    }


@pytest.mark.parametrize("command", ["imagine", "report"])
def test_a_folder_without_a_run_is_a_message_of_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error
