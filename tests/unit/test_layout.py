"""The rooms of the tests: every test file is in one, and what two of them need is in the helpers."""

from __future__ import annotations

import ast

from tests.helpers import ROOT

ROOMS = ("unit", "conformance", "service", "faults")
FILES = sorted((ROOT / "tests").rglob("*.py"))


def test_every_test_file_is_in_a_room() -> None:
    places = {file.relative_to(ROOT / "tests").parts[:-1] for file in FILES if file.name.startswith("test_")}
    assert places == {(room,) for room in ROOMS}


def test_only_files_of_tests_are_in_the_rooms() -> None:
    others = [file for room in ROOMS for file in (ROOT / "tests" / room).rglob("*.py") if not file.name.startswith("test_")]
    assert {file.name for file in others} <= {"__init__.py", "conftest.py"}


def test_nothing_is_imported_from_a_test() -> None:
    wrong = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = ["." * node.level + f"{node.module}.{name}" for name in names]
            for name in names:
                if name.startswith(".") or (name.startswith("tests.") and ".test_" in name):
                    wrong.append(f"{file.name}:{node.lineno} {name}")
    assert wrong == []
