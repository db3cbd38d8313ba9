"""A run folder of an earlier version, with former names of keys and weights, can still be used.

``tests/fixtures/run_c7596e2`` was made by commit c7596e2, the last one before the names changed::

    latentplan train task=dummy:pixels obs=both size=tiny ablation=latentplan env.image_size=16
    env.episode_frames=64 env.workers=false env.count=2 steps=640 replay.capacity=400
    train.prefill=64 train.compile=off train.threads=1 train.precision=float32 train.ratio=32
    world.soft_updates=30 plan.imagine_share=0.4 mpdp.entropy_share=0.5 ... run_dir=run_c7596e2
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from latentplan.cli.main import main
from latentplan.config.loading import load_resolved, to_yaml

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_c7596e2"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the run folder that the earlier version made."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "run"))


def test_an_old_configuration_is_read_with_one_warning(
    old: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_resolved(old / "config.yaml")
    assert (config.env.num_envs, config.world.anneal_updates) == (2, 30)
    assert (config.plan.imagine_fraction, config.mpdp.entropy_fraction) == (0.4, 0.5)
    load_resolved(old / "config.yaml")
    (warning,) = [x.getMessage() for x in caplog.records]
    assert "env.count is now env.num_envs" in warning and str(old) in warning


def test_an_old_run_can_be_evaluated_and_reported(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(old), "--episodes", "2", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["frames"] == 640 and len(result["returns"]) == 2
    out = old / "report.html"
    assert main(["report", str(old), "--out", str(out), "--device", "cpu"]) == 0
    assert "open_loop" in out.read_text()


def test_an_old_run_resumes_from_its_checkpoint(
    old: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = load_resolved(old / "config.yaml", ["steps=768"])
    file = old.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    assert main(["train", str(file), f"run_dir={old}"]) == 0
    assert "resuming from frame 640" in caplog.text
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 768
    assert rows[-1]["train/updates"] > rows[-2]["train/updates"]
    text = (old / "config.yaml").read_text()
    assert "num_envs: 2" in text and "imagine_share" not in text
