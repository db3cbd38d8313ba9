from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from environments import ROOT

from latentplan.cli.main import main
from latentplan.runs import checkpoint
from latentplan.study import runner
from latentplan.study.executors import Resources, local, process
from latentplan.study.matrix import Job, jobs
from latentplan.study.study_file import read_study

STUDY = """
tasks: [dummy:pixels]
ablations: [dreamer]
settings: {obs: state, size: tiny, device: cpu, env.workers: false, eval.episodes: 1,
  behavior.target_entropy: null, train.compile: "off", train.ratio: 4, log.every: 64}
parallel: 2
cpus: 1
"""
RUNNING = "steps: 1000000"
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs ray")
# Importing it here would fix the signal of a preemption.
needs_submitit = pytest.mark.skipif(
    not importlib.util.find_spec("submitit"), reason="needs submitit"
)


def write(folder: Path, steps: str, seeds: str = "[1, 2]") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "small.yaml"
    text = STUDY.replace("log.every", f"{steps}, log.every")
    path.write_text(f"{text}\nseeds: {seeds}\nfolder: {folder / 'runs'}\n")
    return path


def matrix_of(path: Path) -> list[Job]:
    return jobs(read_study(path), path)


def resources_of(path: Path) -> Resources:
    return Resources(2, 1, 0.0, {}, path.parent / "runs")


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def trains(job: Job) -> bool:
    """Whether a run has a row of metrics."""
    return job.progress().frames > 0


def processes_of(path: Path) -> list[psutil.Process]:
    """The processes that train runs of a study."""
    folder = str(path.parent / "runs")
    found = []
    for item in psutil.process_iter():
        try:
            if any(word.startswith(f"run_dir={folder}") for word in item.cmdline()):
                found.append(item)
        except psutil.Error:
            continue
    return found


def numbers(job: Job) -> list[dict[str, float]]:
    """The metrics of a run that do not depend on time or memory."""
    lines = (job.folder / "metrics.jsonl").read_text().splitlines()
    kept = ("step", "episode/", "train/", "imagination/")
    return [{k: x for k, x in json.loads(line).items() if k.startswith(kept)} for line in lines]


def start_study(path: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "latentplan", "study", "run", str(path), *options]
    with (path.parent / "driver.log").open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def test_a_killed_driver_leaves_no_process_and_runs_that_can_go_on(tmp_path: Path) -> None:
    path = write(tmp_path, RUNNING)
    matrix = matrix_of(path)
    driver = start_study(path)
    wait_for(lambda: all(map(trains, matrix)))
    assert len(processes_of(path)) == 2
    driver.kill()
    driver.wait()
    wait_for(lambda: not processes_of(path))
    for job in matrix:
        assert "stopping: saving" in process.log_path(job).read_text()
        assert checkpoint.load(job.folder / "checkpoint.pt")["frames"] >= job.progress().frames


def test_a_failed_run_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write(tmp_path, "steps: 200")
    first, second = matrix_of(path)
    first.folder.parent.mkdir()
    first.folder.write_text("a file where the run folder should be")
    assert runner.run(path) == 1
    assert second.done() and not first.done()
    assert f"seed {first.seed}: failed" in caplog.text
    assert f"seed {second.seed}: done" in caplog.text


def test_runs_share_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [local.gpu_of_slot(x)["CUDA_VISIBLE_DEVICES"] for x in range(3)] == ["3", "5", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert local.gpu_of_slot(1) == {}


def test_a_slot_is_free_again_when_its_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = matrix_of(write(tmp_path, "steps: 200", "[1, 2, 3]"))
    given = []
    monkeypatch.setattr(local, "gpu_of_slot", lambda slot: given.append(slot) or {})
    commands = {job: ["sleep", "60"] for job in matrix}
    commands[matrix[1]] = ["true"]
    monkeypatch.setattr(
        process, "start", lambda job, *_: subprocess.Popen(commands[job], start_new_session=True)
    )
    executor = local.LocalExecutor(Resources(2, 1, 0.0, {}, tmp_path))
    executor.start(matrix[:2])
    wait_for(lambda: executor.poll() == {matrix[1]: 0}, 10)
    executor.start(matrix[2:])
    executor.stop()
    assert given == [0, 1, 1]


@pytest.mark.parametrize(
    ("option", "message"), [("--address=x:1", "--executor ray"), ("--parallel=-1", "at least 1")]
)
def test_wrong_options_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert main(["study", "run", str(write(tmp_path, RUNNING)), option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ray", "submitit"])
def test_a_missing_package_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    executor = {"ray": "ray", "submitit": "slurm"}[name]
    assert main(["study", "run", str(write(tmp_path, RUNNING)), "--executor", executor]) == 2
    assert f"latentplan[{executor}]" in capsys.readouterr().err


@needs_submitit
def test_a_job_that_is_preempted_goes_on_with_its_run(tmp_path: Path) -> None:
    from latentplan.study.executors.slurm import SlurmExecutor

    path = write(tmp_path, "steps: 800", "[1]")
    (job,) = matrix_of(path)
    executor = SlurmExecutor(resources_of(path), "local")
    executor.start([job])
    wait_for(lambda: trains(job))
    assert executor.poll() == {}
    ((_, handle),) = executor._running.items()
    handle._process.send_signal(signal.SIGTERM)
    ended: dict[Job, int] = {}
    wait_for(lambda: ended.update(executor.poll()) or ended)
    executor.stop()
    assert ended == {job: 0} and job.done()
    assert "stopping: saving" in process.log_path(job).read_text()
    assert len(json.loads((job.folder / "run.json").read_text())["sessions"]) == 2


@needs_submitit
def test_jobs_of_a_stopped_study_are_not_queued_again(tmp_path: Path) -> None:
    from latentplan.study.executors.slurm import SlurmExecutor

    path = write(tmp_path, RUNNING, "[1]")
    (job,) = matrix_of(path)
    executor = SlurmExecutor(resources_of(path), "local")
    executor.start([job])
    wait_for(lambda: trains(job))
    executor.stop()
    wait_for(lambda: not processes_of(path))
    assert checkpoint.load(job.folder / "checkpoint.pt")["frames"] >= job.progress().frames
    assert not list((path.parent / "runs" / "submitit").glob("stopped-*"))


@needs_submitit
def test_jobs_of_submitit_give_the_numbers_of_local_runs(tmp_path: Path) -> None:
    from latentplan.study.executors.slurm import SlurmExecutor

    path = write(tmp_path / "local", "steps: 200", "[1]")
    assert runner.run(path) == 0
    other = write(tmp_path / "slurm", "steps: 200", "[1]")
    assert runner.run_jobs(matrix_of(other), SlurmExecutor(resources_of(other), "debug")) == 0
    assert numbers(matrix_of(path)[0]) == numbers(matrix_of(other)[0]) != []


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of this test: a head and two workers of one core each."""
    variables = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # everything listens on 127.0.0.1 only
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": str(ROOT),
    }
    os.environ.update(variables)  # which `environment_variables` undoes
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 100 * 2**20}
    ray = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    try:
        for _ in range(2):
            ray.add_node(num_cpus=1, **store)
        yield ray.address
    finally:
        ray.shutdown()


@pytest.mark.last
@needs_ray
def test_ray_gives_the_numbers_of_local_runs_although_a_worker_dies(
    tmp_path: Path, cluster: str
) -> None:
    seeds = "[1, 2, 3, 4, 5, 6, 7, 8]"
    path = write(tmp_path / "ray", "steps: 200", seeds)
    matrix = matrix_of(path)
    study = start_study(path, "--executor", "ray", "--address", cluster)
    wait_for(lambda: any(map(trains, matrix)))
    worker = processes_of(path)[0].parent()
    assert worker.name().startswith("ray::")
    worker.kill()
    assert study.wait(900) == 0, (path.parent / "driver.log").read_text()
    sessions = {
        job: len(json.loads((job.folder / "run.json").read_text())["sessions"]) for job in matrix
    }
    assert sorted(sessions.values()) == [1, 1, 1, 1, 1, 1, 1, 2]
    assert not processes_of(path)

    other = write(tmp_path / "local", "steps: 200", seeds)
    assert start_study(other).wait(900) == 0
    for job, same in zip(matrix, matrix_of(other), strict=True):
        assert job.done() and len(numbers(job)) > 2
        # A run that stopped within an episode goes on with a new one, so it may differ from there.
        rows = slice(0, 1 if sessions[job] > 1 else None)
        assert numbers(job)[rows] == numbers(same)[rows]


@pytest.mark.last
@needs_ray
def test_a_stopped_study_on_ray_saves_its_runs_and_is_for_this_machine_alone(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, RUNNING)
    matrix = matrix_of(path)
    study = start_study(path, "--executor", "ray")
    wait_for(lambda: all(map(trains, matrix)), 300)
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for item in psutil.Process(study.pid).children(recursive=True)
        for connection in item.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}
    study.send_signal(signal.SIGINT)
    assert study.wait(200) == 128 + signal.SIGINT
    wait_for(lambda: not processes_of(path))
    for job in matrix:
        assert "stopping: saving" in process.log_path(job).read_text()
        assert checkpoint.load(job.folder / "checkpoint.pt")["frames"] >= job.progress().frames
