"""Files are whole or not there."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, cast

import pytest

from selfpruner.errors import DiskFullError
from selfpruner.files import atomic
from selfpruner.jobs.runs import Run
from selfpruner.store.tables import Job


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


def test_a_report_that_breaks_off_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one would pass for the report at the next call."""
    whole = Path.write_text

    def half(path: Path, text: str, *rest: Any) -> int:
        whole(path, text[: len(text) // 2], *rest)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    run = Run(cast("Job", None), tmp_path / "checkpoint", tmp_path / "result.json")
    with pytest.raises(DiskFullError):
        run.write_result({"best_plan": "0" * 16})
    assert list(tmp_path.iterdir()) == []
