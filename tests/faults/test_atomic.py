"""Files are whole or not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from selfpruner.errors import DiskFullError
from selfpruner.files import atomic


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "facts.json"
    with atomic.replacing(file) as aside:
        aside.write_text("half")
        assert not file.exists()
        aside.write_text("whole")
    assert file.read_text() == "whole"
    assert list(file.parent.iterdir()) == [file]


def test_what_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    atomic.write_text(file, "before")

    def fail() -> None:
        with atomic.replacing(file) as aside:
            aside.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError, match=r"facts\.json"):
        fail()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_one(tmp_path: Path) -> None:
    file, link = tmp_path / "real" / "facts.json", tmp_path / "facts.json"
    link.symlink_to(file)
    atomic.write_text(link, "ü")
    assert link.is_symlink()
    assert file.read_text("utf-8") == "ü"
