"""The examples run as they stand, each in a process of its own, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfpruner.files import manifest
from server.settings import ServerSettings
from tests.helpers import ROOT
from tests.helpers.fake_openai import FakeOpenAI
from tests.helpers.serving import running_server

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: object, **environment: str) -> str:
    """What the example prints."""
    command = (sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments))
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def small(sample_text: Callable[[int, int], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fields that make everything small."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(sample_text(20_000, 0))
    source = {"sources": [{"source": str(text)}], "length": 64}
    return {
        "ffn_step": 8,
        "calibration": {**source, "sequences": 8},
        "fitness_text": {**source, "sequences": 24},
        "report_text": {**source, "sequences": 4},
        "probe_tokens": 64,
        "generations": 1,
        "stages": [{"tokens": 64, "keep": 2}],
        "final_tokens": 128,
        "device": "cpu",
    }


@pytest.fixture
def fields(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("SELFPRUNER_CACHE", str(tmp_path / "cache"))

    def write(**more: Any) -> Path:
        file = tmp_path / "fields.json"
        file.write_text(json.dumps({**small, **more}))
        return file

    return write


def test_there_are_five_and_each_is_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) == 5
    assert all(len(file.read_text("utf-8").splitlines()) < 40 for file in files)


def test_search_your_model_and_read_its_population(tiny_llama: Path, fields: Callable[..., Path], tmp_path: Path) -> None:
    printed = run("search_your_model", tiny_llama, tmp_path / "out", fields())
    assert [line.split()[0] for line in printed.splitlines()] == ["dense", "uniform", "best", "loaded"]
    manifest.check(tmp_path / "out" / "checkpoint")
    printed = run("read_a_population", tmp_path / "out" / "selfpruner.db")
    assert "uniform" in printed
    assert "of the uniform plan's fitness" in printed


def test_your_criterion(tiny_llama: Path, fields: Callable[..., Path], tmp_path: Path) -> None:
    assert "verified: equal" in run("your_criterion", tiny_llama, tmp_path / "out", fields())
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (plan["criterion"], plan["pattern"]) == ("root_wanda", "n_m")


def test_your_llm(tiny_llama: Path, fields: Callable[..., Path], fake_openai: FakeOpenAI, tmp_path: Path) -> None:
    settings = {"LLM_URL": fake_openai.base_url, "LLM_MODEL": "scripted", "LLM_KEY": "sk-mine"}
    few = fields(preset="self-pruner", population=4, crossover_offspring=2, mutation_offspring=2)
    printed = run("your_llm", tiny_llama, tmp_path / "out", few, **settings)
    assert "the LLM as initialize: " in printed
    assert set(fake_openai.keys) == {"Bearer sk-mine"}


def test_over_http(tmp_path: Path) -> None:
    with running_server(ServerSettings(home=tmp_path / "home")) as server:
        printed = run("over_http", server.url, tmp_path / "out")
    assert "candidate.evaluated" in printed
    manifest.check(tmp_path / "out")
