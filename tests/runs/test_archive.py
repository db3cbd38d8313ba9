"""Checkpoints that would take memory without bound are refused before torch reads them."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from latentplan.runs import checkpoint, payload
from latentplan.types import UserError


def members(content: object) -> dict[str, bytes]:
    """The members of the zip file that torch writes for a checkpoint's content."""
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "payload": content}, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sealed(archive: bytes) -> bytes:
    """The bytes of a checkpoint file, with the right CRC32."""
    return archive + checkpoint._MARK + zlib.crc32(archive).to_bytes(4, "big")


def packed(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return sealed(file.getvalue())


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(checkpoint.DamagedCheckpointError, match="damaged or is not a checkpoint"):
        checkpoint.load(path)


def test_an_archive_that_is_not_compressed_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(packed(members({"x": torch.ones(3)})))
    assert checkpoint.load(tmp_path / "a.pt")["x"].tolist() == [1, 1, 1]


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    content = packed(members({"x": torch.zeros(2**20)}), zipfile.ZIP_DEFLATED)
    assert len(content) < 2**15
    refused(tmp_path / "a.pt", content)


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members({"x": torch.zeros(2**16)}).items():
            archive.writestr(name, data)
        # A zip file ends with a list of its members, which may name the same bytes many times.
        archive.filelist += [x for x in archive.filelist if x.file_size == 2**18] * 10
    refused(tmp_path / "a.pt", sealed(file.getvalue()))


@pytest.mark.parametrize(
    "pickle",
    [
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1tR.",
        b"\x80\x04\x8c\x08builtins\x8c\x09bytearray\x93)R.",
        b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1),
        b"",
    ],
)
def test_pickles_that_call_other_functions_are_refused(tmp_path: Path, pickle: bytes) -> None:
    parts = {name: pickle if name.endswith(".pkl") else x for name, x in members({}).items()}
    refused(tmp_path / "a.pt", packed(parts))


def test_a_second_pickle_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "a.pt", packed({**members({}), "archive/DATA.PKL": b"\x80\x02N."}))


def test_lists_that_contain_a_list_twice_give_one_sentence(tmp_path: Path) -> None:
    endless: list[object] = []
    for _ in range(60):
        endless = [endless, endless]
    with pytest.raises(UserError, match="a very large value"):
        payload.read_agent({"frames": endless}, tmp_path / "a.pt", 16)
    with pytest.raises(UserError, match="a very large value"):
        payload.read_agent({"frames": {"a": endless}}, tmp_path / "a.pt", 16)
