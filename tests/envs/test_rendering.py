"""Rendering: the choice of a backend, the quality of images, and error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import ROOT, make, run_python

from latentplan.cli import doctor
from latentplan.envs import needs_renderer, rendering
from latentplan.envs.probe import missing_library
from latentplan.envs.rendering import Probe, Renderer, choose_renderer, probe
from latentplan.types import UserError

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            missing_library(name) is not None, reason=f"{name}: {missing_library(name)}"
        ),
    )
    for name in ("egl", "osmesa")
]

COMPARE = """
import json, sys
import numpy as np
from latentplan.envs import dmc
from latentplan.envs.rendering import Renderer

task, backend, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
images = {}
for quality in ("plain", "exact", "fast"):
    renderer = Renderer(backend, "exact" if quality == "plain" else quality, True, "")
    tune = dmc.rendering.tune_model
    if quality == "plain":
        dmc.rendering.tune_model = lambda *arguments: None
    simulator = dmc.build(task, "pixels", size, renderer)
    dmc.rendering.tune_model = tune
    simulator.reset(seed=1, episode=0)
    frames, rng = [], np.random.default_rng(0)
    for _ in range(6):
        for _ in range(4):
            simulator.advance(rng.uniform(simulator.action_low, simulator.action_high))
        if quality == "plain":  # as dm_control itself draws
            frames.append(simulator._env.physics.render(size, size, camera_id=0))
        else:
            frames.append(simulator.observe()["image"])
    images[quality] = np.stack(frames).astype(float)
    simulator.close()
result = {q: np.abs(images[q] - images["plain"]).mean() for q in ("exact", "fast")}
print(json.dumps({**result, "spread": images["plain"].std()}))
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget earlier probes, and ignore MUJOCO_GL of this machine."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    rendering._probe_once.cache_clear()
    yield
    rendering._probe_once.cache_clear()


@pytest.fixture
def no_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the OpenGL libraries by empty files, which the loader refuses."""
    names = ("libEGL.so.1", "libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so", "libGL.so.1")
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", ["cheetah_run", "walker_walk"])
def test_exact_images_equal_those_of_dm_control(task: str, backend: str) -> None:
    differences = json.loads(run_python("-c", COMPARE, task, backend, "64", MUJOCO_GL=backend))
    assert differences["exact"] < 0.05  # gray levels
    assert 0.5 < differences["fast"] < 10  # the same scene without shadows
    assert differences["spread"] > 10  # the image is not flat


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_probe_draws_and_measures_the_time(backend: str) -> None:
    result = probe(backend, seconds=0.15)
    assert result.works, result.reason
    assert result.description
    assert result.software == ("llvmpipe" in result.description.lower())
    if result.software:
        assert result.seconds["fast"] < 0.5 * result.seconds["exact"]


def test_this_machine_can_draw() -> None:
    renderer = choose_renderer()
    assert renderer.backend in ("egl", "osmesa")
    assert renderer.quality == ("fast" if renderer.software else "exact")


@pytest.mark.parametrize("obs", ["pixels", "both"])
def test_pixels_through_workers(obs: str) -> None:
    with make("dmc:cheetah_run", obs, workers=True, num_envs=2, repeat=4) as env:
        row, _ = env.reset()
        assert set(row.obs) == ({"image"} if obs == "pixels" else {"image", "vector"})
        image = row.obs["image"]
        assert image.shape == (2, 64, 64, 3) and image.dtype == "uint8"
        assert image.mean() > 20 and image.std() > 10
        assert env.spec.images == ["image"]


def test_only_control_suite_pixels_need_a_renderer() -> None:
    assert needs_renderer("walker_walk", "pixels") and needs_renderer("cup-catch", "both")
    assert not needs_renderer("walker_walk", "state")
    assert not needs_renderer("dummy:pixels", "pixels")


@pytest.mark.parametrize(("software", "quality"), [(True, "fast"), (False, "exact")])
def test_the_default_quality_follows_the_renderer(
    software: bool, quality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(backend: str) -> Probe:
        if backend == "egl":
            return Probe("egl", False, "no device")
        return Probe(backend, True, software=software, description="driver")

    monkeypatch.setattr(rendering, "_probe_once", answer)
    assert choose_renderer() == Renderer("osmesa", quality, software, "driver")
    assert choose_renderer(quality="exact").quality == "exact"
    assert choose_renderer(quality="fast").quality == "fast"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert choose_renderer().backend == "glfw"  # auto follows MUJOCO_GL
    assert choose_renderer("osmesa").backend == "osmesa"
    with pytest.raises(UserError, match="no device"):
        choose_renderer("egl")
    monkeypatch.undo()  # before the other fixture clears the cache of the real function


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"backend": "metal"}, "env.renderer=metal"), ({"quality": "nice"}, "render_quality=nice")],
)
def test_unknown_settings_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose_renderer(**settings)


@pytest.mark.usefixtures("no_libraries")
def test_missing_libraries_are_named_with_their_packages() -> None:
    result = probe("osmesa")
    assert not result.works
    assert (result.library, result.package) == ("libOSMesa.so.8", "libosmesa6")
    with pytest.raises(UserError, match="apt-get install libegl1 libosmesa6") as caught:
        choose_renderer()
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    report, ok = doctor.diagnose()
    assert not ok
    assert "libEGL.so.1 is missing (Debian package libegl1)" in report
    assert "obs=state" in report and "Traceback" not in report and "NoneType" not in report


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -SEGV $$", "crashed"),
        ("echo first >&2; echo last >&2; exit 3", "last"),
        ("exec sleep 30", "no image within"),
    ],
)
def test_a_driver_that_ends_its_process_is_reported(
    script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(rendering.sys, "executable", str(python))
    monkeypatch.setattr(rendering, "_TIMEOUT", 1.0)
    result = probe("egl")
    assert not result.works and words in result.reason


def test_one_process_cannot_change_its_renderer() -> None:
    code = """
from latentplan.envs import dmc
from latentplan.envs.rendering import Renderer
from latentplan.types import UserError
dmc.build("cartpole_swingup", "state", 64, None).close()  # chooses no renderer
simulator = dmc.build("cartpole_swingup", "pixels", 64, Renderer(BACKEND, "fast", True, ""))
simulator.reset(0, 0)
print(simulator.observe()["image"].mean() > 10)
simulator.close()
try:
    dmc.build("cartpole_swingup", "pixels", 64, Renderer("glfw", "fast", True, ""))
except UserError as error:
    print(error)
"""
    backend = choose_renderer().backend
    works, refusal = run_python("-c", code.replace("BACKEND", repr(backend))).splitlines()
    assert works == "True" and f"already draws with {backend}" in refusal


def test_the_doctor_reports_versions_timings_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SECONDS", 0.1)
    report, ok = doctor.diagnose()
    assert ok
    for words in (
        "mujoco",
        "exact",
        "fast",
        "dm_control's own",
        "torch.compile",
        "ms",
        "not black",
        "cores",
        "disk",
        "ready",
    ):
        assert words in report
    assert "untested" not in report and "Traceback" not in report


def test_the_doctor_warns_of_an_untested_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda backend, seconds: Probe(backend, False, "no"))
    true_version = doctor.version
    monkeypatch.setattr(
        doctor, "version", lambda name: "4.0.0" if name == "mujoco" else true_version(name)
    )
    report, ok = doctor.diagnose("/no/such/folder")
    assert not ok
    assert "mujoco 4.0.0 is an untested pair; dm_control 1.0.50 with mujoco 3.17.0" in report


def test_the_tested_pair_is_the_one_that_is_installed() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for name, version in doctor.TESTED.items():
        assert any(pin.replace("-", "_") == f"{name}=={version}" for pin in pins)


FILM = """
import json
import numpy as np
from latentplan.config.schema import EnvConfig
from latentplan.envs import Renderer, make_vector

def play(obs, film, workers=False):
    settings, renderer = EnvConfig(workers=workers, repeat=2), Renderer("BACKEND", "fast", True, "")
    rows, pictures = [], []
    with make_vector(
        "cartpole_swingup", obs, settings, num_envs=1, seed=0, renderer=renderer, film=film
    ) as env:
        rows.append(env.reset()[0])
        for _ in range(3):
            pictures += [env.draw(0)] if film else []
            rows.append(env.step(np.ones((1, 1)))[0])
    return rows, pictures

if __name__ == "__main__":
    plain, filmed = play("pixels", False)[0], play("pixels", True)[0]
    assert all(np.array_equal(a.obs["image"], b.obs["image"]) for a, b in zip(plain, filmed))
    for workers in (False, True):
        rows, pictures = play("state", True, workers)
        assert set(rows[0].obs) == {"vector"}
        assert {x.image.shape for x in pictures} == {(256, 256, 3)}
        assert {x.seconds for x in pictures} == {0.02}  # two frames of 0.01 s
        assert len({x.image.tobytes() for x in pictures}) == 3 and pictures[0].image.mean() > 10
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_film_is_drawn_for_any_observations(backend: str, tmp_path: Path) -> None:
    """The images of the agent are the same with and without a film."""
    (tmp_path / "film.py").write_text(FILM.replace("BACKEND", backend))
    run_python(str(tmp_path / "film.py"))
