from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from environments import ROOT

from latentplan.cli import main
from latentplan.config import flatten, load, preset_folder
from latentplan.study.matrix import jobs, read_study, table

STUDY = """
tasks: [dummy:count]
ablations: [dreamer, optimistic_only]
seeds: [1, 2]
settings: {obs: state, size: tiny, steps: 300, env.workers: false, eval.episodes: 1}
parallel: 2
"""
ABLATIONS = sorted(path.stem for path in (preset_folder() / "ablation").glob("*.yaml"))


def write(tmp_path: Path, text: str = STUDY) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(text + f"\nfolder: {tmp_path / 'runs'}\n")
    return path


def test_a_study_is_the_product_of_its_lists(tmp_path: Path) -> None:
    path = write(tmp_path)
    matrix = jobs(read_study(path), path)
    assert [(job.ablation, job.seed) for job in matrix] == [
        ("dreamer", 1),
        ("optimistic_only", 1),
        ("dreamer", 2),
        ("optimistic_only", 2),
    ]
    assert len({job.folder for job in matrix}) == 4 and {job.steps for job in matrix} == {300}
    assert not any(job.done() for job in matrix)


def test_the_table_says_where_runs_are(tmp_path: Path) -> None:
    path = write(tmp_path)
    matrix = jobs(read_study(path), path)
    matrix[0].folder.mkdir(parents=True)
    lines = '{"step": 150, "episode/eval_score": 7.4}\n{"step": 300}\n{"step": 3'
    (matrix[0].folder / "metrics.jsonl").write_text(lines)
    assert matrix[0].done()
    text = table(matrix, {matrix[1].folder: "running"})
    assert "done 7" in text and "running 0%" in text and text.count("waiting 0%") == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: []", "names no tasks"),
        ("tasks: [a]\nseed: [1]", "seed"),
        ("tasks: [a]\nseeds: [1, 1]", "twice"),
        ("tasks: [a]\nparallel: 0", "parallel"),
        ("tasks: [a]\nsettings: {task: b}", "set by the study"),
        ("tasks: [a]\nsettings: {world.memberss: 2}", "world.members"),
        ("tasks: [a]\nablations: [nothing]", "nothing"),
        ("tasks: [", "not valid"),
    ],
)
def test_mistakes_start_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert main(["study", "run", str(write(tmp_path, text))]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_study_runs_and_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path)
    command = [sys.executable, "-m", "latentplan.cli", "study", "run", str(path)]

    def run() -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert run().count("done") >= 4
    assert all(job.done() for job in jobs(read_study(path), path))
    assert "running" not in run()  # nothing was left to do
    longer = write(tmp_path, STUDY.replace("steps: 300", "steps: 400"))
    assert "running" in run()
    assert all(job.progress().frames >= 400 for job in jobs(read_study(longer), longer))


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    text = STUDY.replace("dummy:count", "dummy:nothing").replace("[1, 2]", "[1]")
    path = write(tmp_path, text)
    done = subprocess.run(
        [sys.executable, "-m", "latentplan.cli", "study", "run", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 1 and "failed" in done.stderr and ".log" in done.stderr


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_something(name: str) -> None:
    plain, changed = (flatten(asdict(load([], x))) for x in ([], [f"ablation={name}"]))
    apart = {key for key in plain if plain[key] != changed[key]} - {"ablation", "run_dir"}
    assert apart or name == "dreamer"
