"""The Python API and the commands without a server, on a tiny model: search, prune, export, evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import selfpruner
from selfpruner import api
from selfpruner.cli import app as cli
from selfpruner.errors import ConfigError, ModelNotFoundError, NotFoundError, UnknownNameError, UnsupportedModelError
from selfpruner.planning.space import Plan


@pytest.fixture(scope="module")
def fields(tiny_llama: Path, sample_text: Callable[[int, int], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(sample_text(20_000, 0))
    source = {"sources": [{"source": str(text)}], "length": 64}
    return {
        "model": str(tiny_llama),
        "preset": "evolution",
        "ffn_step": 8,
        "calibration": {**source, "sequences": 8},
        "fitness_text": {**source, "sequences": 24},
        "report_text": {**source, "sequences": 4},
        "probe_tokens": 64,
        "generations": 1,
        "stages": [{"tokens": 64, "keep": 2}],
        "final_tokens": 128,
        "device": "cpu",
        "dtype": "float32",
    }


def test_prune_evaluate_and_the_command_line(fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    made = api.prune(tmp_path / "uniform", rate=0.2, cache=cache, **fields)
    model = selfpruner.load(made.path)
    assert sum(p.numel() for p in model.parameters()) == made.parameters
    assert made.verification["greedy"] == "equal"
    text = fields["report_text"]["sources"][0]["source"]
    options = {"text": [text], "sequences": 4, "length": 64, "device": "cpu", "cache": cache}
    dense = api.evaluate(fields["model"], against=fields["model"], **options)
    pruned = api.evaluate(made.path, against=fields["model"], **options)
    assert dense.kl == pytest.approx(0, abs=1e-6)
    assert pruned.kl is not None
    assert pruned.kl > 0.001
    assert pruned.parameters == made.parameters < dense.parameters

    # The same plan from the checkpoint's own plan.json: the same checkpoint, which is kept.
    config = tmp_path / "config.json"
    config.write_text(json.dumps({key: value for key, value in fields.items() if key != "preset"}))
    arguments = ["prune", "--plan", str(made.path / "plan.json"), "-c", str(config), "-o", str(tmp_path / "uniform"), "--json"]
    code = cli.run([*arguments, "--rate", "0.2", "--cache", str(cache)])
    printed = json.loads(capsys.readouterr().out)
    assert code == 0
    assert Plan(tuple(printed["levels"])) == made.plan
    assert printed["parameters"] == made.parameters


def test_search_leaves_what_it_says_and_export_takes_any_plan(fields: dict[str, Any], tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    result = api.search(0.2, run, cache=cache, **fields)
    report = json.loads((run / "result.json").read_text())
    assert report["best"]["kl"] == pytest.approx(result.report["best"]["kl"])
    assert (run / "checkpoint" / "manifest.json").exists()
    again = api.export(run, run / "checkpoint", cache=cache)
    assert again.plan.hash == report["best_plan"]
    assert again.parameters == report["best"]["parameters"]
    with pytest.raises(NotFoundError):
        api.export(run, tmp_path / "other", plan="0" * 16, cache=cache)


def test_bad_requests_leave_nothing_behind(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError):
        api.search(0.2, tmp_path / "run", **{**fields, "preset": "default", "proposer": "nobody"})
    with pytest.raises(ConfigError):
        api.search(1.2, tmp_path / "run", **fields)
    with pytest.raises(ConfigError, match="fitness text has 2 sequences"):
        api.search(0.2, tmp_path / "run", **{**fields, "fitness_text": {**fields["fitness_text"], "sequences": 2}})
    with pytest.raises(ConfigError):
        api.prune(tmp_path / "run", **fields)
    with pytest.raises(ConfigError):
        api.prune(tmp_path / "run", rates=[0.1] * 3, levels=[0] * 6, **fields)
    with pytest.raises(NotFoundError):
        api.export(tmp_path / "nothing", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_pruned_is_refused_before_a_worker_starts(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pool(*_: Any, **__: Any) -> Any:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(api, "_with_pool", no_pool)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    unsuitable = {**fields, "model": str(tmp_path / "model")}
    gone = {**fields, "model": str(tmp_path / "gone")}
    for settings, error in ((unsuitable, UnsupportedModelError), (gone, ModelNotFoundError)):
        with pytest.raises(error):
            api.search(0.2, tmp_path / "run", **settings)
        with pytest.raises(error):
            api.prune(tmp_path / "out", rate=0.2, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
