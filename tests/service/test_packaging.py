"""What is installed: the dependencies that are declared, and what a wheel holds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import ROOT

PACKAGES = ("selfpruner", "server", "prompts")
# Needed and never imported: transformers reads GGUF files with the first, altair draws PNG and SVG with the second.
UNSEEN = {"accelerate", "vl-convert-python"}
# Where a package is called otherwise than what it is imported as.
DISTRIBUTIONS = {"yaml": "pyyaml", "lm-eval": "lm-eval", "llama-cpp": "llama-cpp-python"}


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


def sources() -> list[Path]:
    return [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)


def test_what_is_imported_is_declared_and_what_is_declared_is_used() -> None:
    modules = {name for file in sources() for name in imported(file)} - sys.stdlib_module_names - {*PACKAGES}
    used = {DISTRIBUTIONS.get(normal(name), normal(name)) for name in modules}
    declared = names(project()["dependencies"])
    extras = names([each for group in project()["optional-dependencies"].values() for each in group])
    assert sorted(used - declared - extras) == []
    assert declared - used == UNSEEN


def test_what_is_declared_is_pinned_and_the_version_has_its_changes() -> None:
    pinned = names([line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line])
    assert names(project()["dependencies"]) <= pinned
    assert re.search(
        rf"^## \[{re.escape(project()['version'])}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M
    )


def test_the_workflow_tests_the_versions_of_python_that_are_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8"))
    promised = [line.rpartition(" ")[2] for line in project()["classifiers"] if line.startswith("Programming Language")]
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == promised
    assert project()["requires-python"] == f">={promised[0]}"


def test_the_hooks_are_what_make_runs() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [hook["id"] for hook in local["hooks"]] == ["ruff", "ruff-format", "mypy"]


@pytest.mark.slow
def test_a_wheel_holds_what_runs(tmp_path: Path) -> None:
    """The product and its data, nothing else; and it can be imported without the checkout."""

    def tracked(*folders: str) -> set[str]:
        listed = subprocess.run(("git", "ls-files", *folders), check=True, cwd=ROOT, capture_output=True, text=True)
        return set(listed.stdout.split())

    # From a copy: setuptools leaves a folder in the checkout that its next build takes files from.
    for name in tracked(*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        place = tmp_path / "source" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place)
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tmp_path / "source"))
    subprocess.run((sys.executable, "-m", "pip", *build), check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("selfpruner-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == tracked(*PACKAGES)

    code = (
        "import selfpruner, prompts, server.app, selfpruner.cli.app, selfpruner.store.schema\n"
        "from importlib.resources import files\n"
        "print(selfpruner.__file__, len((files('selfpruner') / 'store' / 'views.sql').read_text()))\n"
        "print(prompts.__file__, len((files('prompts') / 'system.j2').read_text()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")}
    command = (sys.executable, "-P", "-c", code)
    done = subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        file, length = line.split()
        assert file.startswith(str(tmp_path / "unpacked"))
        assert int(length) > 0
