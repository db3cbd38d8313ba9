from __future__ import annotations

from pathlib import Path

import pytest

from latentplan.config.loading import load
from latentplan.study.matrix import jobs
from latentplan.study.study_file import read_study
from latentplan.study.sweep import expand
from latentplan.types import UserError

STUDY = "tasks: [walker_walk]\nseeds: [1]\nablations: [dreamer, many]\n"
STUDY += "variants: {many: {ablation: coplanner, plan.candidates: 8}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(f"{STUDY}{text}\nfolder: {folder / 'runs'}\n")
    return path


def test_a_grid_has_every_combination_for_every_ablation(tmp_path: Path) -> None:
    path = write(tmp_path, "sweep: {plan.horizon: [2, 4], optim: {actor_lr: [0.001]}}")
    matrix = jobs(read_study(path), path)
    configs = [load([], job.overrides) for job in matrix]
    settings = [(x.ablation, x.plan.candidates, x.plan.horizon, x.optim.actor_lr) for x in configs]
    assert settings == [
        ("dreamer", 1, 2, 0.001),
        ("dreamer", 1, 4, 0.001),
        ("coplanner", 8, 2, 0.001),
        ("coplanner", 8, 4, 0.001),
    ]
    assert matrix[3].ablation == "many,horizon=4,actor_lr=0.001"
    assert matrix[3].folder.name == "walker_walk-many,horizon=4,actor_lr=0.001-s1"


def test_a_random_search_depends_on_its_seed_alone(tmp_path: Path) -> None:
    axes = "sweep: {optim.actor_lr: {low: 0.0001, high: 0.01, log: true}, plan.horizon: [2, 3]}"
    found = []
    for seed in (0, 0, 1):
        path = write(tmp_path, f"{axes}\nsamples: 6\nsweep_seed: {seed}")
        matrix = jobs(read_study(path), path)
        assert len(matrix) == 12
        found.append([load([], job.overrides).optim.actor_lr for job in matrix])
    assert found[0] == found[1] != found[2]
    assert all(0.0001 <= x <= 0.01 for x in found[0])


def test_numbers_are_drawn_within_their_range_and_evenly_in_their_logarithm() -> None:
    points = expand({"a.x": {"low": "1", "high": "3"}, "b": ["p", "q"]}, 6, 0).values()
    assert {point["a.x"] for point in points} <= {"1", "2", "3"}
    drawn = [
        float(p["x"])
        for p in expand({"x": {"low": "1e-4", "high": "1", "log": "true"}}, 400, 0).values()
    ]
    assert min(drawn) >= 1e-4 and max(drawn) <= 1
    assert 0.4 < sum(x < 0.01 for x in drawn) / len(drawn) < 0.6  # half of the logarithms


def test_a_part_of_a_grid_has_no_repeats() -> None:
    axes = {"x": [str(i) for i in range(10)], "y": ["a", "b"]}
    assert len(expand(axes, 15, 0)) == 15
    assert len(expand(axes, 99, 0)) == len(expand(axes, 0, 0)) == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sweep: {plan.horizon: 3}\nsamples: 2", "neither a list"),
        ("sweep: {plan.horizon: {low: 3, high: 2}}\nsamples: 2", "neither a list"),
        ("sweep: {plan.horizon: {low: 0, high: 2, log: true}}\nsamples: 2", "neither a list"),
        ("sweep: {plan.horizon: {low: 1, high: 2}}", "needs samples"),
        ("sweep: {plan.horizon: []}\nsamples: 1", "neither a list"),
        ("sweep: {plan.horizon: [1, 1]}", "same name"),
        ("sweep: {plan.horizon: {low: 1, high: 1000000}}\nsamples: 20000", "more than"),
        ("sweep: {plan.horizonn: [1]}", "plan.horizon"),
        ("sweep: {seed: [1]}", "set by the study"),
        ("sweep: [1]", "sweep cannot be"),
        ("cpus: -1", "cpus"),
        ("gpus: nan", "gpus"),
    ],
)
def test_an_invalid_sweep_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message):
        jobs(read_study(path), path)


def test_names_of_variants_and_values_do_not_leave_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "sweep: {env.module: ['../../x.py']}")
    assert all(x.folder.parent == tmp_path / "runs" for x in jobs(read_study(path), path))
    path.write_text("tasks: [a]\nablations: [../x]\nvariants: {../x: {steps: 3}}")
    with pytest.raises(UserError, match="part of folder names"):
        read_study(path)


def test_a_search_over_steps_keeps_ablations_apart(tmp_path: Path) -> None:
    path = write(tmp_path, "sweep: {steps: [100, 200]}")
    assert [job.steps for job in jobs(read_study(path), path)] == [100, 200, 100, 200]
