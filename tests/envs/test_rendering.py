"""Rendering: the choice of a backend, the quality of images, and error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import ROOT, make, run_python

from latentplan.cli import doctor
from latentplan.config.loading import load
from latentplan.envs import may_need_renderer, pick_renderer, rendering
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
            simulator.advance(rng.uniform(simulator.actions.low, simulator.actions.high))
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


def test_tasks_without_images_or_simulator_need_no_renderer() -> None:
    assert may_need_renderer("walker_walk", "pixels") and may_need_renderer("cup-catch", "both")
    assert may_need_renderer("gym:Hopper-v5", "pixels")
    assert not may_need_renderer("walker_walk", "state")
    assert not may_need_renderer("dummy:pixels", "pixels")


def test_a_renderer_is_chosen_for_gymnasium_tasks_that_mujoco_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    pick = lambda *items: pick_renderer(load([], items))  # noqa: E731
    assert pick("task=gym:Hopper-v5", "obs=pixels") == choose_renderer()
    assert pick("task=gym:Hopper-v5", "obs=state") is None
    assert pick("task=gym:Pendulum-v1", "obs=pixels") is None


@pytest.mark.usefixtures("no_libraries")
def test_without_opengl_only_what_needs_it_is_refused() -> None:
    with make("gym:Pendulum-v1", "pixels", workers=True, image_size=32) as env:
        assert env.reset()[0].obs["image"].mean() > 200
    with pytest.raises(UserError, match="apt-get install libegl1 libosmesa6"):
        make("gym:Hopper-v5", "pixels", workers=True)


# The simulator runs in this process, and MuJoCo must not have been imported before.
HOPPER = """
import numpy as np, json, sys
from latentplan.envs import gym
from latentplan.envs.rendering import Renderer
renderer = Renderer(sys.argv[1], sys.argv[2], True, "")
build = lambda: gym.build("Hopper-v5", "pixels", "", 32, renderer)
one, other, closed = build(), build(), build()
for simulator in (one, other, closed):
    simulator.reset(seed=3, episode=0)
closed.close()
other.advance(np.ones(3))
frames = [simulator.observe()["image"] for simulator in (one, other)]
frames += [one.observe()["image"]]
same, moved = np.array_equal(frames[0], frames[2]), not np.array_equal(frames[0], frames[1])
one.close(), other.close()
means = [float(frames[0].mean())]
for _ in range(2):  # after the contexts of others have been freed
    one = build()
    one.reset(seed=3, episode=0)
    means.append(float(one.observe()["image"].mean()))
    one.close()
print(json.dumps([frames[0].shape, means, same, moved]))
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_gymnasiums_mujoco_tasks_are_drawn_small_and_side_by_side(
    backend: str, quality: str
) -> None:
    shape, means, same, moved = json.loads(run_python("-c", HOPPER, backend, quality))
    assert shape == [32, 32, 3] and means[0] > 50 and means == means[:1] * 3
    assert same and moved


HOPPER_FILM = """
import json, sys
import numpy as np
from latentplan.envs import gym
from latentplan.envs.rendering import Renderer
renderer = Renderer(sys.argv[1], "exact", True, "")
plain, film = (gym.build("Hopper-v5", "pixels", "", 64, renderer, {}, x) for x in (False, True))
state = gym.build("Hopper-v5", "state", "", 64, renderer, {}, True)
for simulator in (plain, film, state):
    simulator.reset(seed=3, episode=0)
    simulator.advance(np.ones(3))
pictures = [film.draw(), state.draw()]
images = [x.observe()["image"] for x in (plain, film)]
borders = [float(x.mean()) for x in (pictures[0][:64], pictures[0][:, -64:])]
print(json.dumps([
    [x.shape for x in pictures], np.array_equal(*pictures), np.array_equal(*images), borders
]))
for simulator in (plain, film, state):
    simulator.close()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_films_of_gymnasiums_mujoco_tasks_have_a_size_of_their_own(backend: str) -> None:
    """The whole picture is drawn, and the images of the agent stay as they are without a film."""
    shapes, same_pictures, same_images, borders = json.loads(run_python("-c", HOPPER_FILM, backend))
    assert shapes == [[256, 256, 3]] * 2 and same_pictures and same_images
    assert min(borders) > 20


MUJOCO = """
import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces

XML = "<mujoco><worldbody><light pos='0 0 3'/><geom type='sphere' size='.1'/></worldbody></mujoco>"


class Camera(gymnasium.Env):  # it draws its observation itself
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self):
        view = spaces.Box(0, 255, (24, 24, 3), np.uint8)
        self.observation_space = spaces.Dict(view=view, pose=spaces.Box(-1, 1, (3,), np.float32))
        self.model = mujoco.MjModel.from_xml_string(XML)
        self.data, self.renderer = mujoco.MjData(self.model), None

    def observe(self):
        self.renderer = self.renderer or mujoco.Renderer(self.model, 24, 24)
        mujoco.mj_forward(self.model, self.data)
        self.renderer.update_scene(self.data)
        return {"view": self.renderer.render(), "pose": np.zeros(3, np.float32)}

    def reset(self, *, seed=None, options=None):
        return self.observe(), {}

    def step(self, action):
        return self.observe(), 0.0, False, False, {}


gymnasium.register("Camera-v0", Camera)
"""


@pytest.mark.parametrize("obs", ["pixels", "state"])
def test_an_environment_that_draws_its_observation_gets_a_renderer(
    obs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    file = tmp_path / "camera.py"
    file.write_text(MUJOCO)
    with make("gym:Camera-v0", obs, workers=True, module=str(file)) as env:
        row, _ = env.reset()
    if obs == "pixels":
        assert row.obs["image"].max() > 50


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
        "gym:Hopper-v5 is drawn with",
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
