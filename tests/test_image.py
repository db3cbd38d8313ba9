"""The steps of the Dockerfile, run by buildah, which needs no engine and no registry of images.

The base is a small Debian system that debootstrap makes. The test takes about ten minutes.
It runs where ``LATENTPLAN_BUILD_OPTIONS`` is set, since a container does not see the certificates
and the package indexes that this machine is set up with. The variable has the options of ``buildah
build`` that bring them in, such as ``--volume``. It is empty where the network is open.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from environments import ROOT

import latentplan

PROGRAMS = ("buildah", "debootstrap")
OPTIONS = "LATENTPLAN_BUILD_OPTIONS"
PYTHON = "python3,python3-venv,ca-certificates"  # in the place of a base image with Python
pytestmark = [
    pytest.mark.last,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)),
        reason="an image is built only by root, with buildah and debootstrap",
    ),
    pytest.mark.skipif(OPTIONS not in os.environ, reason=f"{OPTIONS} is not set"),
]


def run(*command: object, **options: object) -> str:
    done = subprocess.run(
        ["nice", *map(str, command)], capture_output=True, text=True, timeout=3600, **options
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[object]]:
    """The command that runs something in a container of the image, as the image's user."""
    folder = tmp_path_factory.mktemp("image")
    buildah = ["buildah", "--root", folder / "root", "--runroot", folder / "runroot"]
    buildah += ["--storage-driver", "vfs"]
    build = [*buildah, "build", "--isolation", "chroot", "--layers=false"]
    base = folder / "base"
    run("debootstrap", "--variant=minbase", f"--include={PYTHON}", "bookworm", base / "system")
    (base / "Dockerfile").write_text("FROM scratch\nCOPY system /\n")
    run(*build, "--tag", "base", base)
    options = shlex.split(os.environ[OPTIONS])
    run(*build, *options, "--build-arg", "BASE=localhost/base", "--tag", "latentplan", ROOT)
    name = run(*buildah, "from", "localhost/latentplan").strip()
    yield [*buildah, "run", "--isolation", "chroot", name, "--"]
    run(*buildah, "rm", "--all")
    shutil.rmtree(folder)


def test_the_image_trains(container: list[object]) -> None:
    assert run(*container, "latentplan", "--version").split()[-1] == latentplan.__version__
    settings = ["size=tiny", "steps=600", "train.prefill=200", "run_dir=/runs/try"]
    run(*container, "latentplan", "train", "task=dummy:pixels", *settings)
    assert "checkpoint.pt" in run(*container, "ls", "/runs/try")
