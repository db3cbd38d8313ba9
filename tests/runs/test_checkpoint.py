from __future__ import annotations

import errno
import io
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from latentplan.runs import checkpoint
from latentplan.types import UserError


def _payload() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "counters": {"frames": 2000, "score": 1.5, "done": False, "best": None},
        "envs": [3, 4],
        "pair": (1, "x"),
    }


def _assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert type(one) is type(other) and len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            _assert_same(a, b)
    else:
        assert type(one) is type(other) and one == other


def test_load_returns_the_saved_payload(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint.save(path, _payload())
    _assert_same(_payload(), checkpoint.load(path))
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


def test_saving_again_replaces_the_checkpoint_and_keeps_the_former_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.with_name("checkpoint.pt.tmp").write_bytes(b"left by a crash")
    for frames in (1, 2, 3):
        checkpoint.save(path, {"frames": frames})
    assert checkpoint.load(path) == {"frames": 3}
    assert checkpoint.load(tmp_path / "checkpoint.1.pt") == {"frames": 2}
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint.1.pt"}


class _FullDisk(io.FileIO):
    """A file on a disk with room for ``room`` more bytes."""

    room = 0

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return super().write(data)


@pytest.mark.parametrize("room", [0, 100, 3000, 100_000])
def test_a_disk_full_while_writing_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"frames": 1})

    def full_open(self: Path, mode: str) -> _FullDisk:
        file = _FullDisk(self, mode)
        file.room = room
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_open)
        with pytest.raises(UserError, match=r"No space left on device.*previous one is intact"):
            checkpoint.save(path, {"frames": 2, "weights": torch.ones(100_000)})
    assert checkpoint.load(path) == {"frames": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_full_at_the_end_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"frames": 1})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UserError, match="No space left"):
            checkpoint.save(path, {"frames": 2})
        with pytest.raises(UserError, match="there is none yet"):
            checkpoint.save(tmp_path / "other.pt", {"frames": 2})
    assert checkpoint.load(path) == {"frames": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_content_is_synced_to_the_disk_before_the_file_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    checkpoint.save(tmp_path / "checkpoint.pt", {"frames": 1})
    assert order == ["fsync", "replace", "fsync"]
    order.clear()
    checkpoint.save(tmp_path / "checkpoint.pt", {"frames": 2})
    assert order == ["fsync", "replace", "replace", "fsync"]


@pytest.mark.parametrize(
    "value", [np.float64(1.0), np.zeros(2), {1, 2}, Path("x"), [nn.Linear(1, 1)], {(1, 2): 3}]
)
def test_values_that_cannot_be_loaded_are_not_saved(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(TypeError, match=r"payload\['a'\]\['b'\].*cannot hold"):
        checkpoint.save(path, {"a": OrderedDict(b=value)})
    assert not path.exists()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_the_error_names_a_truncated_checkpoint(tmp_path: Path, fraction: float) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, _payload())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged or is not a checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "content",
    [b"hello world", b"PK\x03\x04" + b"x" * 100, b"\x80\x02}q\x00.", b"\x00" * 5000, b"{}\n"],
)
def test_a_file_of_another_kind_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged or is not a checkpoint"):
        checkpoint.load(path)


def test_damaged_bytes_raise_no_other_error(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, _payload())
    content = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = content.copy()
        start = int(rng.integers(len(damaged)))
        damaged[start : start + 20] = rng.integers(0, 256, len(damaged[start : start + 20]))
        path.write_bytes(damaged.tobytes())
        with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
            checkpoint.load(path)


def test_other_torch_files_and_missing_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with pytest.raises(UserError, match="There is no checkpoint"):
        checkpoint.load(path)
    for content in ({"weights": torch.ones(3)}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(UserError, match="not a checkpoint of this version"):
            checkpoint.load(path)


def test_loading_runs_no_code_from_the_file(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "created"),))

    path = tmp_path / "checkpoint.pt"
    torch.save({"format": checkpoint.FORMAT, "payload": Malicious()}, path)
    with pytest.raises(UserError):
        checkpoint.load(path)
    assert not (tmp_path / "created").exists()


def _draws() -> tuple[Any, ...]:
    return (
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.standard_normal(),
        random.random(),
        random.gauss(0, 1),
    )


def test_global_random_states_can_be_saved_and_restored(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    _draws()  # NumPy and Python draw normal numbers in pairs; one of a pair is now kept for later
    checkpoint.save(path, checkpoint.random_state())
    first, second = _draws(), _draws()
    assert first != second
    checkpoint.set_random_state(checkpoint.load(path))
    assert (_draws(), _draws()) == (first, second)


def test_generators_can_be_saved_and_restored(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    rng = np.random.default_rng(3)
    rng.integers(10, dtype=np.uint32)  # PCG64 keeps the other 32 of its 64 bits for the next draw
    state = checkpoint.generator_state(rng)
    assert state["state"]["state"].bit_length() > 64
    checkpoint.save(path, {"rng": state})
    expected = rng.integers(2**32, size=5, dtype=np.uint32).tolist()
    other = np.random.default_rng(4)
    checkpoint.set_generator_state(other, checkpoint.load(path)["rng"])
    assert other.integers(2**32, size=5, dtype=np.uint32).tolist() == expected
