"""Weights & Biases and MLflow: with small stand-ins, and with the packages where there are any."""

from __future__ import annotations

import json
import logging
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import EPISODE, run_config

from latentplan.cli.main import main
from latentplan.config.loading import load
from latentplan.config.schema import sink_names
from latentplan.runs.sinks import PARAMETERS_PER_CALL, Sinks, check_installed
from latentplan.training.session import train
from latentplan.types import UserError

CONFIG = load([], ["device=cpu", "task=walker_walk", "log.sinks=wandb,mlflow"])


def module(name: str, **content: Any) -> ModuleType:
    result = ModuleType(name)
    result.__spec__ = ModuleSpec(name, None, origin="a stand-in")
    result.__dict__.update(content)
    return result


class FakeWandb:
    """Records the calls of ``wandb``."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.rows: list[dict[str, float]] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.begun.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


class MlflowError(Exception):
    def __init__(self, error_code: str) -> None:
        super().__init__(f"the server says {error_code}")
        self.error_code = error_code


class FakeMlflow:
    """Records what a client of ``mlflow`` gets."""

    def __init__(self) -> None:
        self.runs: dict[str, SimpleNamespace] = {}
        self.experiments: dict[str, str] = {}
        self.failure: Exception | None = None

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        number = self.experiments.get(name)
        return None if number is None else SimpleNamespace(experiment_id=number)

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        run_id = f"{len(self.runs) + 0xABC:032x}"
        run = {"name": run_name, "experiment": experiment, "status": "RUNNING"}
        self.runs[run_id] = SimpleNamespace(**run, params={}, rows=[], sizes=[])
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def get_run(self, run_id: str) -> SimpleNamespace:
        if self.failure:
            raise self.failure
        if run_id not in self.runs:
            raise MlflowError("RESOURCE_DOES_NOT_EXIST")
        return self.runs[run_id]

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].status = status

    def set_terminated(self, run_id: str) -> None:
        self.runs[run_id].status = "FINISHED"

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        if self.failure:
            raise self.failure
        run = self.runs[run_id]
        run.sizes.append(len(params))
        run.params.update(params)
        run.rows.extend(metrics)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    fake = FakeWandb()
    settings = SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=fake.init, Settings=settings))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    entities = SimpleNamespace(
        Metric=lambda name, value, time, step: (name, value, step),
        Param=lambda key, value: (key, value),
    )
    content = {"MlflowClient": lambda: fake, "MlflowException": MlflowError, "entities": entities}
    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow", **content))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return fake


def folder(tmp_path: Path) -> Path:
    path = tmp_path / "myrun"
    path.mkdir(exist_ok=True)
    return path


def session(names: list[str], path: Path, frame: int = 10) -> None:
    sinks = Sinks(names, path, CONFIG)
    sinks.scalars({"episode/score": 5.0, "bad": math.nan, "worse": math.inf}, frame)
    sinks.close()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]


# --- the configuration ----------------------------------------------------------------------


def test_sinks_are_named_in_one_key() -> None:
    assert sink_names("") == [] == sink_names(" , ")
    assert sink_names("mlflow, wandb,mlflow") == ["mlflow", "wandb"]
    with pytest.raises(UserError, match=r"log\.sinks can name wandb and mlflow, not 'wandbb'\."):
        load([], ["log.sinks=mlflow,wandbb"])


def test_a_missing_package_is_named_with_its_extra_before_a_run_begins(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wandb: FakeWandb,
) -> None:
    check_installed(["wandb"])
    monkeypatch.setattr("latentplan.runs.sinks.importlib.util.find_spec", lambda name: None)
    run = tmp_path / "run"
    assert (
        main(["train", "task=dummy:count", "obs=state", f"run_dir={run}", "log.sinks=mlflow"]) == 2
    )
    assert "pip install 'latentplan[mlflow]'" in capsys.readouterr().err
    assert not run.exists()


def test_a_folder_named_like_a_package_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B makes a folder ``wandb`` in the working folder, which may be on Python's path."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"latentplan\[wandb\]"):
        check_installed(["wandb"])


# --- what is passed on ----------------------------------------------------------------------


def test_wandb_gets_the_configuration_and_finite_values(tmp_path: Path, wandb: FakeWandb) -> None:
    session(["wandb"], folder(tmp_path))
    (options,) = wandb.begun
    assert (options["project"], options["name"]) == ("latentplan", "myrun")
    assert options["config"]["task"] == "walker_walk" and "env.repeat" in options["config"]
    assert options["dir"] == tmp_path / "myrun" and options["settings"].console == "off"
    assert wandb.metrics == [("*", "frame")]
    assert wandb.rows == [{"frame": 10, "episode/score": 5.0}] and wandb.finished == 1


def test_wandb_goes_on_with_the_same_run(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for frame in (10, 20):
        session(["wandb"], folder(tmp_path), frame)
    first, second = wandb.begun
    assert first["id"] == second["id"] == (tmp_path / "myrun" / "wandb_id").read_text().strip()
    assert first["resume"] == "allow" and second["project"] == "mine"
    assert [row["frame"] for row in wandb.rows] == [10, 20]


def test_mlflow_gets_the_configuration_and_finite_values(
    tmp_path: Path, mlflow: FakeMlflow
) -> None:
    session(["mlflow"], folder(tmp_path))
    (run,) = mlflow.runs.values()
    assert (run.name, run.status) == ("myrun", "FINISHED") and list(mlflow.experiments) == [
        "latentplan"
    ]
    assert run.params["task"] == "walker_walk" and len(run.params) > PARAMETERS_PER_CALL
    assert max(run.sizes) <= PARAMETERS_PER_CALL
    assert run.rows == [("episode/score", 5.0, 10)]


def test_mlflow_goes_on_with_the_same_run_if_it_still_exists(
    tmp_path: Path,
    mlflow: FakeMlflow,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    for frame in (10, 20):
        session(["mlflow"], folder(tmp_path), frame)
    (run,) = mlflow.runs.values()
    assert [step for *_, step in run.rows] == [10, 20] and list(mlflow.experiments) == ["mine"]
    assert warnings(caplog) == []
    mlflow.runs.clear()
    session(["mlflow"], folder(tmp_path), 30)
    assert len(mlflow.runs) == 1 and "a new one is started" in warnings(caplog)[0]


@pytest.mark.parametrize("text", ["", "../../x", "abc", "A" * 32, "f" * 5000, "0" * 32 + "\n/x"])
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_damaged_id_is_not_used(
    tmp_path: Path,
    wandb: FakeWandb,
    mlflow: FakeMlflow,
    caplog: pytest.LogCaptureFixture,
    name: str,
    text: str,
) -> None:
    path = folder(tmp_path) / f"{name}_id"
    path.write_text(text)
    session([name], folder(tmp_path))
    assert path.read_text().strip() in {*mlflow.runs, *(x["id"] for x in wandb.begun)} - {text}
    assert f"{path} does not hold the id of a run" in warnings(caplog)[0]


# --- failures -------------------------------------------------------------------------------


def test_a_sink_that_fails_gives_one_warning_and_others_go_on(
    tmp_path: Path, wandb: FakeWandb, mlflow: FakeMlflow, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = Sinks(["mlflow", "wandb"], folder(tmp_path), CONFIG)
    mlflow.failure = MlflowError("TEMPORARILY_UNAVAILABLE")
    for frame in (10, 20):
        sinks.scalars({"x": 1.0}, frame)
    sinks.close()
    assert warnings(caplog) == [
        "mlflow gets no more metrics in this session, which goes on: the server says "
        "TEMPORARILY_UNAVAILABLE"
    ]
    assert [row["frame"] for row in wandb.rows] == [10, 20] and wandb.finished == 1


def test_a_server_that_cannot_be_asked_starts_no_second_run(
    tmp_path: Path, mlflow: FakeMlflow, caplog: pytest.LogCaptureFixture
) -> None:
    session(["mlflow"], folder(tmp_path))
    before = (tmp_path / "myrun" / "mlflow_id").read_text()
    mlflow.failure = MlflowError("INTERNAL_ERROR")
    session(["mlflow"], folder(tmp_path))
    assert len(mlflow.runs) == 1 and (tmp_path / "myrun" / "mlflow_id").read_text() == before
    assert len(warnings(caplog)) == 1


def test_a_sink_that_cannot_start_or_end_does_not_end_the_run(
    tmp_path: Path,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(**options: Any) -> None:
        raise ValueError

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["wandb"], "init", fail)
        session(["wandb"], folder(tmp_path))
    assert wandb.rows == [] and warnings(caplog)[0].endswith("goes on: ValueError")
    monkeypatch.setattr(wandb, "finish", lambda: 1 / 0)
    session(["wandb"], folder(tmp_path))
    assert len(wandb.rows) == 1 and "division by zero" in warnings(caplog)[1]


def test_wandb_does_not_take_its_settings_from_a_run_folder(
    tmp_path: Path,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``wandb/settings`` of the working folder may name another server, which gets the key."""
    inside = folder(tmp_path) / "inside"
    inside.mkdir()
    for place in (tmp_path / "myrun", inside):
        monkeypatch.chdir(place)
        session(["wandb"], folder(tmp_path))
    assert wandb.begun == [] and "another working folder" in warnings(caplog)[0]


# --- whole runs -----------------------------------------------------------------------------


def metrics(path: Path) -> dict[int, dict[str, float]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return {row.pop("step"): row for row in map(json.loads, lines)}


def test_a_run_sends_every_row_of_metrics(tmp_path: Path, wandb: FakeWandb) -> None:
    run = train(run_config(tmp_path / "run", f"steps={2 * EPISODE}", "log.sinks=wandb"))
    train(run_config(run, f"steps={4 * EPISODE}", "log.sinks=wandb"))
    sent = {int(row.pop("frame")): row for row in wandb.rows}
    assert sent == metrics(run) and len(sent) == 4
    first, second = wandb.begun
    assert first["id"] == second["id"] and second["config"]["steps"] == 4 * EPISODE
    assert wandb.finished == 2


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    for steps in (2, 4):
        run = train(run_config(tmp_path / "run", f"steps={steps * EPISODE}", "log.sinks=wandb"))
    run_id = (run / "wandb_id").read_text().strip()
    files = list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {path.name for path in files} == {f"run-{run_id}.wandb"}
    content = b"".join(path.read_bytes() for path in files)
    for text in (b"episode/eval_score", b"train/loss/rew", b"env.repeat", b"frame"):
        assert text in content
    for row in metrics(run).values():
        assert repr(row["fps/env"]).encode() in content


def test_mlflow_in_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    for steps in (2, 4):
        run = train(run_config(tmp_path / "run", f"steps={steps * EPISODE}", "log.sinks=mlflow"))
    client = mlflow.MlflowClient()
    run_id = (run / "mlflow_id").read_text().strip()
    logged = client.get_run(run_id)
    assert logged.info.status == "FINISHED" and logged.info.run_name == "run"
    assert logged.data.params["env.repeat"] == "4" and len(logged.data.params) > 100
    expected = metrics(run)
    assert set(logged.data.metrics) == {name for row in expected.values() for name in row}
    for name in ("episode/score", "episode/eval_score", "time"):
        history = {point.step: point.value for point in client.get_metric_history(run_id, name)}
        assert history == {frame: row[name] for frame, row in expected.items() if name in row}
    assert len(client.search_runs([logged.info.experiment_id])) == 1
    (run / "mlflow_id").write_text("0" * 32)
    session(["mlflow"], run)
    assert len(client.search_runs([logged.info.experiment_id])) == 2
    assert any("a new one is started" in text for text in warnings(caplog))
