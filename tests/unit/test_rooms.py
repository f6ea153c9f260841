"""The rooms of the house: no arrow upward between them, no circle between files, and no torch where only is served or asked."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import ROOT

# From the ground upward. A room uses rooms below it, and files at the top level count as rooms.
ROOMS = (
    *("json_objects", "errors", "catalogue", "environment", "stages", "records", "progress", "redaction", "tables", "config"),
    *("files", "models", "architectures", "calibration", "compensation", "criteria", "planning", "pruning"),
    *("workers", "evaluation", "export", "timing", "judging", "proposers", "operators", "evolution"),
    *("store", "jobs", "api", "client", "cli", "__main__", "testing"),
)


@cache
def modules() -> dict[str, Path]:
    found = {}
    for folder in ("selfpruner", "server"):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports() -> dict[str, frozenset[str]]:
    """What each module imports of ours, also inside functions and for types only."""
    graph = {}
    for name, file in modules().items():
        used = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    used.add(whole if whole in modules() else node.module)
            elif isinstance(node, ast.Import):
                used.update(alias.name for alias in node.names)
        graph[name] = frozenset(used & modules().keys() - {name})
    return graph


def room(name: str) -> str:
    return name.split(".")[1] if name.startswith("selfpruner.") else name.split(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in modules()} == {*ROOMS, "selfpruner", "server"}


def test_no_arrow_points_upward() -> None:
    height = {name: number for number, name in enumerate(ROOMS)}
    upward = [
        f"{name} imports {used}"
        for name, all_used in imports().items()
        if room(name) in height
        for used in all_used
        # The command line starts the server, and the server is built from what lies below the command line.
        if (room(used) == "server" and room(name) != "cli") or height.get(room(used), 0) > height[room(name)]
    ]
    assert upward == []


def test_the_server_uses_nothing_above_jobs() -> None:
    above = ROOMS[ROOMS.index("jobs") + 1 :]
    assert [
        f"{name}: {used}" for name in modules() if room(name) == "server" for used in imports()[name] if room(used) in above
    ] == []


def test_no_two_files_use_each_other() -> None:
    TopologicalSorter(imports()).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize(
    "name",
    [
        "selfpruner",
        "selfpruner.testing",
        "selfpruner.client",
        "selfpruner.cli.app",
        "selfpruner.evaluation.split",
        "selfpruner.judging.held_out",
        "selfpruner.jobs.run",
        "selfpruner.jobs.runs",
        "server.app",
    ],
)
def test_what_serves_or_asks_imports_no_torch(name: str) -> None:
    code = f"import sys, {name}; print([m for m in ('torch', 'transformers', 'pytest') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_two_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for name, file in modules().items():
        if not file.name.startswith("modeling_selfpruner"):  # each travels alone, with a checkpoint
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, []).append(name)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("word", "rooms"),
    [
        ("rejected", ("operators", "proposers")),  # by a race; what an LLM proposes in vain is refused
        ("runtime", ("workers", "jobs", "api", "server")),  # what serves a checkpoint; a worker has a handler
    ],
)
def test_a_word_names_nothing_else(word: str, rooms: tuple[str, ...]) -> None:
    said = set()
    for name, file in modules().items():
        if room(name) in rooms:
            for node in ast.walk(ast.parse(file.read_text())):
                names = (getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
                said.update(f"{name}: {found}" for found in names if isinstance(found, str) and word in found.lower().split("_"))
    assert said == set()


def test_commands_write_files_whole_or_not_at_all() -> None:
    beside = [
        f"{name}:{node.lineno}"
        for name, file in modules().items()
        if room(name) == "cli"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("write_text", "write_bytes") and ast.unparse(node.value) != "atomic"
    ]
    assert beside == []
