"""CONTRIBUTING names files and classes that exist."""

from __future__ import annotations

import re

from tests.helpers import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_files_of_ten_likely_changes_exist() -> None:
    changes = rows("Ten likely changes")
    assert len(changes) == 10
    for change, files in changes:
        named = re.findall(r"`([\w./]+)`", files)
        assert len(named) >= 2, change
        missing = [name for name in named if "NEW" not in name and not (ROOT / name).is_file()]
        missing += [name for name in named if "NEW" in name and not (ROOT / name).parent.is_dir()]
        assert missing == [], change


def test_other_files_that_it_names_exist() -> None:
    named = {name for name in re.findall(r"`([\w./<>]+/[\w.<>]+)`", TEXT) if "<" not in name and "NEW" not in name}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_word_has_one_meaning_and_its_classes_exist() -> None:
    vocabulary = rows("Vocabulary")
    words = [word for word, _ in vocabulary]
    assert len(words) == len(set(words))
    source = "\n".join(file.read_text("utf-8") for file in (ROOT / "selfpruner").rglob("*.py"))
    classes = {name for _, meaning in vocabulary for name in re.findall(r"`([A-Z]\w+)`", meaning)}
    assert [name for name in sorted(classes) if f"class {name}" not in source] == []
