"""Criteria side by side: what runs, what is kept, what a second call repeats, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfpruner import catalogue
from selfpruner.cli import app as cli
from selfpruner.errors import ConfigError, UnknownNameError
from selfpruner.jobs.comparison import Method, methods_of
from selfpruner.testing.tiny_models import sample_text, tiny_model


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("compare")
    text = folder / "text.txt"
    text.write_text(sample_text(30_000, seed=3))
    model = tiny_model(folder / "model", "llama")
    common = ["--model", str(model), "--calibration", str(text), "--text", str(text), "--sequences", "4", "--length", "64"]
    small = ["-s", "calibration.sequences=8", "-s", "calibration.length=64", "-s", "ffn_step=8", "--device", "cpu"]

    def run(*arguments: str) -> int:
        return cli.run(["compare", *arguments, *common, *small, "--cache", str(folder / "cache")])

    return run


def test_methods_of_patterns() -> None:
    assert methods_of(["structured"], ["obs"]) == [Method("structured", "obs", name) for name in catalogue.COMPENSATIONS]
    every = methods_of(list(catalogue.PATTERNS))
    assert {m.criterion for m in every} == set(catalogue.CRITERIA)
    assert not any(m.compensation == "bias" and m.pattern != "structured" for m in every)
    assert len(every) == len(set(every))
    with pytest.raises(UnknownNameError):
        methods_of(["structured"], ["obsolete"])
    with pytest.raises(ConfigError, match="not structured"):
        methods_of(["structured"], ["ria"])


def test_a_table_a_picture_and_nothing_twice(call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--patterns", "structured,n_m", "--criteria", "magnitude,wanda", "--compensations", "none"]
    assert call("-o", str(tmp_path), "--rates", "0.25", "0.5", *methods) == 0
    out = capsys.readouterr().out
    assert "structured, rate 0.25" in out
    assert "n_m, rate 0.5" in out
    body = json.loads((tmp_path / "compare.json").read_text())
    rows = {(r["pattern"], r["criterion"], r["compensation"], r["rate"]): r for r in body["rows"]}
    # wanda is not for units: its place among the structured ones is empty
    assert len(rows) == 2 * (1 + 2)
    assert body["dense"]["perplexity"] > 1
    for (pattern, criterion, compensation, rate), row in rows.items():
        assert row["kl"] > 0
        assert row["peak_mib"] > 0
        assert row["parameters"] < body["dense"]["parameters"]
        if rate == 0.5:
            assert row["kl"] > rows[pattern, criterion, compensation, 0.25]["kl"]
    table = (tmp_path / "compare.md").read_text()
    assert table.count("### ") == 4
    assert (tmp_path / "compare.svg").read_text().startswith("<svg")
    before = (tmp_path / "compare.json").stat().st_mtime_ns
    assert call("-o", str(tmp_path), "--rates", "0.25,0.5", *methods, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == body["rows"]
    assert (tmp_path / "compare.json").stat().st_mtime_ns == before


def test_a_method_that_fails_says_why_and_stops_no_other(call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--patterns", "n_m", "--criteria", "magnitude", "--compensations", "none", "--rates", "0.5", "-s", "group=7"]
    assert call("-o", str(tmp_path), *arguments) == 1
    assert "do not divide" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("rates", ["", "0.2,x", "1.5", "nan"])
def test_rates_that_are_none(call: Any, tmp_path: Path, rates: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("-o", str(tmp_path), "--rates", rates) == 2
    assert "between 0 and 1" in capsys.readouterr().err


def test_a_model_that_cannot_be_pruned_is_refused_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    assert cli.run(["compare", "-m", str(tmp_path / "model"), "--rates", "0.2", "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "gpt2" in err
    assert len(err.splitlines()) == 1


def test_the_list_of_criteria(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["criteria", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(catalogue.CRITERIA)
    assert rows["gblm"]["needs"] == ["activations", "gradients"]
    assert rows["eggs"]["patterns"] == ["n_m"]
    assert "reconstruction" in rows["eggs"]["source"]
    assert cli.run(["criteria"]) == 0
    assert "sparsegpt" in capsys.readouterr().out
