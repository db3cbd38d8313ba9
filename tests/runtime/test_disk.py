from __future__ import annotations

from pathlib import Path

import pytest

from latentplan.runtime import disk


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    """A stranger's run folder can hold a link with the name of the temporary file."""
    other, path = tmp_path / "other", tmp_path / "run.json"
    other.write_text("mine")
    (tmp_path / "run.json.tmp").symlink_to(other)
    with disk.replacing(path) as file:
        file.write(b"new")
    assert other.read_text() == "mine"
    assert path.read_text() == "new" and not path.is_symlink()


def test_a_file_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.tmp").write_text("half")
    with disk.replacing(tmp_path / "x") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_error_keeps_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), disk.replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and [x.name for x in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_was_locked_for_nothing_is_removed(tmp_path: Path) -> None:
    with disk.locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    with disk.locked(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()
