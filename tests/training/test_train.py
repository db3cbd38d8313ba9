"""Whole runs of the smallest agent on a dummy task, in the process of the tests."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from environments import ROOT, make
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tiny import EPISODE, differing_paths, run_config

from latentplan.agent import Agent
from latentplan.behavior.behavior import Behavior
from latentplan.behavior.planner import Plan
from latentplan.config.loading import load_resolved, to_yaml
from latentplan.config.schema import Config
from latentplan.envs import Renderer, VectorEnv
from latentplan.runs import checkpoint, run_folder
from latentplan.training.session import train
from latentplan.types import Latent, UserError


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_differences(one: Path, other: Path) -> list[str]:
    """The differences between two runs: paths in the checkpoint, replay files, and ``metrics``."""
    result = differing_paths(*(checkpoint.load(run / "checkpoint.pt") for run in (one, other)))
    for file in sorted((one / "replay").glob("*.bin")):
        if file.read_bytes() != (other / "replay" / file.name).read_bytes():
            result.append(file.name)
    scores = [
        [(row["step"], row.get("episode/score"), row.get("episode/eval_score")) for row in rows]
        for rows in (metrics(one), metrics(other))
    ]
    return result + ["metrics"] * (scores[0] != scores[1])


# --- starting -------------------------------------------------------------------------------


def test_several_processes_of_torchrun_do_not_train_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"one process: start it without torchrun"):
        train(run_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    train(run_config(tmp_path / "run", "steps=4", "train.prefill=1000"))


# --- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "extra"),
    [
        (4 * EPISODE, []),
        (EPISODE, []),  # while actions are still random
        (2 * EPISODE, ["obs=pixels", "world.uncertainty=probes", "behavior.gradient=reinforce"]),
        (2 * EPISODE, ["plan.candidates=3", "plan.imagine_fraction=0.5", "plan.replan_every=2"]),
        (2 * EPISODE, ["ablation=mpdp", "mpdp.horizon=2", "behavior.target_entropy=-1"]),
        (2 * EPISODE, ["plan.candidates=3", "train.compile=on"]),
    ],
    ids=["usual", "prefill", "others", "planned", "mpdp", "compiled"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, frames: int, extra: list[str]
) -> None:
    """A session of 2 N frames equals two sessions of N frames, bit for bit."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(run_config(whole, f"steps={2 * frames}", *extra))
    train(run_config(halves, f"steps={frames}", *extra))
    assert checkpoint.load(halves / "checkpoint.pt")["frames"] == frames
    assert {"/frames", "metrics"} <= set(run_differences(whole, halves))  # differences are detected
    train(run_config(halves, f"steps={2 * frames}", *extra))
    assert run_differences(whole, halves) == []


def test_resuming_is_logged_and_continues_the_counters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    with caplog.at_level(logging.INFO, "latentplan"):
        train(run_config(folder, "steps=128"))
        assert "resuming from" not in caplog.text
        caplog.clear()
        train(run_config(folder, "steps=192"))
    assert "resuming from frame 128" in caplog.text
    assert [row["step"] for row in metrics(folder)] == [64, 128, 192]
    times = [row["time"] for row in metrics(folder)]
    assert times == sorted(times)
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 2


def test_the_remaining_time_is_shown_once_updates_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "latentplan"):
        train(run_config(tmp_path / "run", "train.prefill=24", "log.inspect_every=0"))
    lines = [x for x in caplog.messages if x.startswith("frame ")]
    with_estimate = [x.partition("/")[0] for x in lines if "min left" in x]
    assert [x.partition("/")[0] for x in lines] == [f"frame {n}" for n in (64, 128, 192, 256)]
    assert with_estimate == ["frame 192", "frame 256"]


def test_a_finished_run_is_not_changed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(run_config(folder, "steps=128"))
    files = [folder / "checkpoint.pt", *(folder / "replay").glob("*.bin")]
    before = [path.read_bytes() for path in files]
    for steps in (128, 64):
        train(run_config(folder, f"steps={steps}"))
        assert [path.read_bytes() for path in files] == before


def test_some_keys_may_change_when_a_run_continues(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(run_config(folder, "steps=128"))
    train(run_config(folder, "steps=192", "eval.episodes=2", "log.every=32"))
    assert load_resolved(folder / "config.yaml").steps == 192


def test_the_time_limit_ends_a_session_with_a_checkpoint(tmp_path: Path) -> None:
    train(run_config(tmp_path / "run", "train.minutes=0.0001", "steps=1_000_000"))
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["frames"] < 1_000_000


# --- the files of a run ---------------------------------------------------------------------


def test_the_run_folder_is_complete(run: Path) -> None:
    files = {path.name for path in run.iterdir() if not path.name.startswith("events.")}
    # On a slow machine the run saves more than once. Other tests evaluate it.
    assert files - {"checkpoint.1.pt", "eval.json"} == {
        *("checkpoint.pt", "config.yaml", "metrics.jsonl", "replay", "run.json", "videos"),
        *("checkpoints", "console.log", "lock"),
    }
    names = {path.name for path in (run / "videos").iterdir()}
    films = ("open_loop", "imagined_policy", "plan_fan", "dream_against_reality")
    assert {name.rsplit("-", 1)[0] for name in names} == {
        "episode-eval_video",
        *(f"imagination-{name}" for name in films),
    }
    config = load_resolved(run / "config.yaml")
    assert config == run_config(run, "obs=both", "log.inspect_every=128")
    (session,) = json.loads((run / "run.json").read_text())["sessions"]
    assert session["packages"]["torch"] and session["renderer"] == "none"
    assert session["render_backend"] is session["render_quality"] is None
    assert session["precision"] == "float32" and session["machine"]["processor"]
    assert session["spec"]["obs"] == {"image": [[16, 16, 3], "uint8"], "vector": [[2], "float32"]}
    assert {"latentplan", "commit", "command", "python", "machine"} <= session.keys()


def test_the_renderer_of_a_session_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record holds the choice where the configuration says ``auto``."""
    renderer, requested = Renderer("osmesa", "fast", True, "llvmpipe"), []
    monkeypatch.setattr("latentplan.runs.run_folder.may_need_renderer", lambda task, obs: True)

    def pick(config: Config) -> Renderer:
        requested.append(config.env.render_quality)
        return renderer

    monkeypatch.setattr("latentplan.training.start.pick_renderer", pick)
    for steps in (16, 32):
        settings = (f"steps={steps}", "eval.every=0", "log.inspect_every=0")
        train(run_config(tmp_path / "run", *settings))
    session, _ = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert (session["render_backend"], session["render_quality"]) == ("osmesa", "fast")
    assert session["renderer"] == "llvmpipe"
    assert requested == ["auto", "fast"]  # the second session keeps the choice of the first one
    assert load_resolved(tmp_path / "run" / "config.yaml").env.render_quality == "auto"
    assert run_folder.load(tmp_path / "run")[0].env.render_quality == "fast"
    exact = run_config(tmp_path / "run", "env.render_quality=exact")
    assert run_folder.with_recorded_quality(tmp_path / "run", exact) == exact


def test_a_run_keeps_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The precision stays even if the run continues on a machine that would choose another one."""
    decisions = []
    for steps, supported in ((16, False), (32, True)):
        monkeypatch.setattr(
            "latentplan.agent.use_bfloat16",
            lambda precision, _, supported=supported: (
                decisions.append(precision) or supported
                if precision == "auto"
                else precision == "bfloat16"
            ),
        )
        settings = ("eval.every=0", "log.inspect_every=0", "train.precision=auto")
        train(run_config(tmp_path / "run", f"steps={steps}", *settings))
    sessions = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert [session["precision"] for session in sessions] == ["float32", "float32"]
    assert decisions == ["auto"]  # only the first session decides
    assert load_resolved(tmp_path / "run" / "config.yaml").train.precision == "auto"


def test_an_update_without_memory_gives_a_short_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Agent, "update", update)
    with pytest.raises(UserError, match=r"cpu has no memory left. .* train\.batch"):
        train(run_config(tmp_path / "run", "log.inspect_every=0"))


def test_metrics_have_the_usual_names(run: Path) -> None:
    rows = metrics(run)
    assert [row["step"] for row in rows] == [64, 128, 192, 256]
    last = rows[-1]
    for name in (
        *("episode/score", "episode/length", "episode/eval_score", "fps/env", "fps/updates"),
        *(f"train/loss/{x}" for x in ("image", "vector", "rew", "con", "dyn", "rep", "policy")),
        *("train/loss/value", "train/updates", "replay/rows", "memory/rss_gib", "time"),
    ):
        assert isinstance(last[name], int | float) and np.isfinite(last[name]), name
    assert last["episode/length"] == EPISODE
    assert 0 < last["episode/score"] < EPISODE
    assert last["replay/rows"] == 4 * (EPISODE / 4 + 1)  # a reset adds a row but no frame


def test_tensorboard_shows_the_same_values(run: Path) -> None:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    scores = {event.step: event.value for event in events.Scalars("episode/score")}
    assert scores == pytest.approx({row["step"]: row["episode/score"] for row in metrics(run)})
    assert {"episode/eval_video", "imagination/plan_fan"} <= set(events.Tags()["images"])
    film = events.Images("episode/eval_video")[0]
    assert film.width == 192, "large enough for the line of text above it"


def test_tensorboard_has_a_layout_and_a_help_text(run: Path) -> None:
    events = EventAccumulator(str(run)).Reload()
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    charts = layout.category[0].chart
    patterns = [tag for chart in charts for tag in chart.multiline.tag]
    assert len(charts) == 10
    logged = {name for row in metrics(run) for name in row}
    matches = {x: [name for name in logged if re.search(x, name)] for x in patterns}
    assert all(len(names) <= 1 for names in matches.values()), "a pattern must match one metric"
    shown = {name for names in matches.values() for name in names}
    assert {"train/critic/return", "episode/eval_score", "fps/updates"} <= shown
    (help_text,) = events.Tensors("help/text_summary")
    text = help_text.tensor_proto.string_val[0].decode()
    groups = {name.rsplit("/", 1)[0] for name in logged if "/" in name}
    assert all(f"`{group}/`" in text for group in groups - {"train"})
    assert "_hparams_/session_start_info" in events.summary_metadata
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "inspect_every: 128" in config


def test_updates_follow_the_train_ratio(run: Path) -> None:
    saved = checkpoint.load(run / "checkpoint.pt")
    assert saved["frames"] == 256 and saved["decisions"] == 64
    # Each decision after the prefill is replayed 8 times. An update replays 2 x 8 rows.
    assert saved["updates"] == pytest.approx((64 - 20) * 8 / 16, abs=1)


def test_evaluation_and_films_do_not_change_a_run(tmp_path: Path) -> None:
    """Evaluations and films have their own random generators."""
    one, other = tmp_path / "one", tmp_path / "other"
    train(run_config(one, "obs=pixels", "eval.every=0", "log.inspect_every=0"))
    train(run_config(other, "obs=pixels", "eval.every=32", "log.inspect_every=64"))
    assert len(list((other / "videos").iterdir())) > len(list((one / "videos").iterdir())) + 4
    a, b = (checkpoint.load(folder / "checkpoint.pt") for folder in (one, other))
    for key in ("agent", "optimizer", "random", "sampler"):
        assert differing_paths(a[key], b[key]) == []


def test_a_run_with_a_planner_evaluates_actor_and_planner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner is evaluated with ``plan.act_rate`` in each of 16 decisions."""
    rates = []
    original = Behavior.plan

    def plan(self: Behavior, latent: Latent, optimism: float, *args: Any, **options: Any) -> Plan:
        rates.append(optimism)
        return original(self, latent, optimism, *args, **options)

    monkeypatch.setattr(Behavior, "plan", plan)
    settings = ["plan.candidates=3", "plan.act_rate=0.25", "steps=128", "log.inspect_every=0"]
    train(run_config(tmp_path / "run", *settings))
    row = metrics(tmp_path / "run")[-1]
    actor, planner = (row[f"episode/{name}_score"] for name in ("eval", "planner"))
    assert row["episode/planner_gap"] == pytest.approx(planner - actor) and planner != actor
    assert rates.count(0.25) == EPISODE / 4 and {-0.05, 0.1} <= set(rates)


def test_environments_step_while_the_agent_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record_calls(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    record_calls(VectorEnv, "step_async")
    record_calls(Agent, "update")
    record_calls(VectorEnv, "step_wait")
    train(run_config(tmp_path / "run", "steps=128", "log.inspect_every=0"))
    order = " ".join(calls)
    assert "update" in order and re.fullmatch("(step_async( update)* step_wait ?)+", order)


# --- stopping -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends_all_workers(tmp_path: Path, number: signal.Signals) -> None:
    folder, file = tmp_path / "run", tmp_path / "run.yaml"
    config = run_config(folder, "env.workers=true", "env.num_envs=2", "steps=1_000_000")
    file.write_text(to_yaml(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "latentplan", "train", str(file)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C and timeout(1) signal a whole process group
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    watchdog = time.monotonic() + 120
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("frame ") or time.monotonic() > watchdog:
            break
    assert len(psutil.Process(process.pid).children()) >= 2  # the environments
    os.killpg(process.pid, number)
    _, rest = process.communicate(timeout=60)
    text = "".join([*lines, rest])
    assert process.returncode == 128 + number, text
    assert "saving a checkpoint" in text and "Traceback" not in text
    assert checkpoint.load(folder / "checkpoint.pt")["frames"] > 0
    for _ in range(50):  # Python's resource tracker needs a moment to end
        left = [p for p in psutil.process_iter() if _session(p.pid) == process.pid]
        if not left:
            break
        time.sleep(0.1)
    assert left == []


def test_signals_to_the_group_do_not_reach_the_environments() -> None:
    with make("dummy:count", workers=True) as env:
        env.reset()
        workers = [p.pid for p in psutil.Process().children() if "spawn_main" in str(p.cmdline())]
        assert workers and all(os.getpgid(pid) != os.getpgid(0) for pid in workers)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
