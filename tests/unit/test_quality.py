"""Quality as papers report it: the texts and their windows, standard errors, pairs, the file that goes on, the command."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import selfpruner
from benchmarks import quality as benchmark
from selfpruner import api
from selfpruner.cli import app as cli
from selfpruner.errors import ConfigError, ModelError, TextError, UnknownNameError
from selfpruner.judging import corpora, measures, quality
from selfpruner.judging.estimates import Estimate, average, mean, paired
from selfpruner.judging.perplexity import losses, score
from selfpruner.judging.repetition import PROMPTS, after_prompts, continuations, distinct
from selfpruner.judging.task_files import LocalTask
from selfpruner.judging.tasks import JudgeResult
from selfpruner.testing.tiny_models import load_tiny, sample_text, tiny_model, tiny_tokenizer, tokens_of
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of local texts: WikiText-2 with blank rows, C4 with 805 documents."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "wikitext2").mkdir()
    rows = [f" {line} \n" if line else " \n" for line in sample_text(1500, seed=5).split("\n")]
    (folder / corpora.WIKITEXT_FILE).write_text("".join(rows))
    (folder / "c4").mkdir()
    documents = [{"text": f"{number} {sample_text(60, seed=number)}"} for number in range(805)]
    (folder / corpora.C4_FILE).write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    return [tiny_model(folder / f"tiny{seed}", "llama", seed=seed) for seed in (0, 1)]


# -- figures -------------------------------------------------------------------------------------------------------------
def test_figures_of_every_kind_come_back_from_a_worker_as_they_are() -> None:
    """Those of the published table are of all three kinds."""
    stored = json.loads((ROOT / "benchmarks/results/quality.json").read_text("utf-8"))["records"]
    assert {len(record["result"]) for record in stored} == {5, 7}
    for record in stored:
        sent = JudgeResult(result=record["result"], **{name: record[name] for name in ("parameters", "seconds", "cpu_seconds")})
        assert JudgeResult.read(json.loads(json.dumps(sent.to_json()))).result == record["result"]


# -- estimates -----------------------------------------------------------------------------------------------------------
def test_means_and_their_errors() -> None:
    assert mean([1, 0, 0, 1]) == Estimate(0.5, pytest.approx(math.sqrt(1 / 3 / 4)))  # sample variance 1/3
    assert mean([3.0]) == Estimate(3.0, None)
    assert paired([1, 1, 0, 1], [1, 0, 0, 1]) == Estimate(0.25, pytest.approx(0.25))
    assert average([Estimate(1.0, 0.3), Estimate(2.0, 0.4)]) == Estimate(1.5, pytest.approx(0.25))
    assert average([Estimate(1.0, 0.3), Estimate(2.0, None)]).stderr is None


def test_what_both_find_hard_does_not_blur_a_difference() -> None:
    hard = torch.rand(500, generator=torch.Generator().manual_seed(0)).tolist()
    better = [value - 0.01 for value in hard]
    difference = paired(better, hard)
    assert difference.value == pytest.approx(-0.01)
    assert difference.stderr == pytest.approx(0, abs=1e-9)
    assert (mean(hard).stderr or 0) > 0.01


# -- texts ---------------------------------------------------------------------------------------------------------------
def test_wikitext_rows_are_joined_by_a_blank_line() -> None:
    assert corpora.joined_rows(" \n = Title = \n \n Some\u2028text . \n") == "\n\n = Title = \n\n\n\n\n Some\u2028text . \n"


def test_windows_are_consecutive_and_whole(data: Path) -> None:
    text = corpora.corpus("wikitext2", data)
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text.text)["input_ids"]
    rows = corpora.windows(text, tokenizer, 100)
    assert rows.shape == (len(ids) // 100, 100)
    assert rows.flatten().tolist() == ids[: rows.numel()]
    few = corpora.windows(text, tokenizer, 100, 4)
    assert few.tolist() == [rows[len(rows) * index // 4].tolist() for index in range(4)]
    with pytest.raises(TextError, match="not one window"):
        corpora.windows(text, tokenizer, len(ids) + 1)


def test_c4_leaves_the_first_documents_to_calibration(data: Path) -> None:
    text = corpora.corpus("c4", data)
    assert [text.text.split()[0], text.text.startswith("800 ")] == ["800", True]
    assert all(f" {number} " in text.text for number in (801, 804))
    assert "801 and later" in text.source


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_without_a_copy_and_offline_it_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder in (None, tmp_path):
        with pytest.raises(TextError, match=r"cannot be reached.*--data, SELFPRUNER_DATA"):
            corpora.corpus(name, folder)


def test_losses_are_the_score_window_by_window() -> None:
    model, tokens = load_tiny("llama"), tokens_of(5, 40)
    found = losses(model, tokens)
    assert found == pytest.approx([score(model, row[None]).nll for row in tokens])
    logits = model(input_ids=tokens[2:3]).logits[0, :-1].log_softmax(-1)
    assert found[2] == pytest.approx(-float(logits.gather(1, tokens[2, 1:, None]).mean()), rel=1e-5)


# -- writing -------------------------------------------------------------------------------------------------------------
def test_distinct_runs_are_counted_over_all_texts() -> None:
    texts = [[1, 2, 3], [1, 2, 4]]
    assert distinct(texts, 1) == pytest.approx(4 / 6)
    assert distinct(texts, 2) == pytest.approx(3 / 4)
    assert distinct([[1]], 2) == 0


def test_prompts_are_written_on_whole_and_in_order() -> None:
    model, tokenizer = load_tiny("llama"), tiny_tokenizer()
    written = after_prompts(model, tokenizer, PROMPTS[:5], 8)
    alone = [continuations(model, torch.tensor([tokenizer(prompt)["input_ids"]]), 8)[0] for prompt in PROMPTS[:5]]
    assert written == alone


@pytest.mark.parametrize(
    ("text", "reference", "share"),
    [("a b c", "a b c", 1), ("a b d e", "a b c e", 0.5), ("", "a", 0), ("x", "", 1), ("a b", "a", 1)],
)
def test_agreement_ends_at_the_first_other_word(text: str, reference: str, share: float) -> None:
    assert quality.agreement(text, reference) == share


@pytest.mark.parametrize(
    ("models", "short"),
    [
        (["smollm2-135m", "runs/a/checkpoint", "runs/b/checkpoint/"], ["smollm2-135m", "a", "b"]),
        (["x/a/m", "y/a/m", "m"], ["x/a/m", "y/a/m", "m"]),
        (["x/1/m", "y/2/m"], ["1/m", "2/m"]),
        (["checkpoint"], ["checkpoint"]),
        (["runs/a", "runs/a/checkpoint"], ["runs/a", "runs/a/checkpoint"]),
    ],
)
def test_headings_tell_models_apart(models: list[str], short: list[str]) -> None:
    assert quality.labels(models) == short


# -- the file ------------------------------------------------------------------------------------------------------------
def run(models: list[Path], file: Path, data: Path, **options: Any) -> quality.Quality:
    asked = {"perplexity": ["wikitext2", "c4"], "seqlen": [64, 128], "windows": 6, "generation": True, "device": "cpu"}
    return api.quality(models, file, data=data, cache=file.parent / "cache", **{**asked, **options})


def test_measured_written_compared(models: list[Path], data: Path, tmp_path: Path) -> None:
    file = tmp_path / "results" / "quality.json"
    found = run(models, file, data)
    names = ["wikitext2@64", "wikitext2@128", "c4@64", "c4@128", "generation"]
    assert [list(found.found[str(model)]) for model in models] == [names, names]
    kept = json.loads(file.read_text())
    assert [(record["model"], record["measure"]) for record in kept["records"]] == [(str(m), n) for m in models for n in names]

    first = found.found[str(models[0])]["wikitext2@64"]
    assert str(data) not in json.dumps(first["setting"]), "where the text lies is no setting"
    result = first["result"]
    assert (result["windows"], result["tokens"]) == (6, 6 * 63)
    own = losses(load_tiny("llama"), corpora.windows(corpora.corpus("wikitext2", data), tiny_tokenizer(), 64, 6))
    assert result["outcomes"]["nll"] == pytest.approx(own, abs=1e-4)
    assert result["nll"] == pytest.approx(mean(own).value, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(mean(own).value), rel=1e-4)
    assert result["perplexity_stderr"] == pytest.approx(result["perplexity"] * result["nll_stderr"], rel=1e-3)

    rows = {row.name: row for row in found.rows}
    assert list(rows) == [*names[:-1], "repetition", "distinct-1", "distinct-2", "distinct-3", "words as tiny0"]
    assert rows["wikitext2@64"].cells[0].difference is None
    both = [found.found[str(model)]["wikitext2@64"]["result"]["outcomes"]["nll"] for model in models]
    assert rows["wikitext2@64"].cells[1].difference == paired(both[1], both[0])
    assert rows["words as tiny0"].cells[0].value.value == 1
    table = quality.markdown(found)
    assert table.splitlines()[2].startswith("| parameters | 31,968 | 31,968 |")
    assert f"{result['perplexity']:.2f} ±{result['perplexity_stderr']:.2f}" in table


def test_the_same_call_goes_on(models: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "quality.json"
    real, loads = measures.ModelPlace.load, list[str]()

    def load(place: measures.ModelPlace) -> measures.MeasuredModel:
        loads.append(Path(place.name).name)
        return real(place)

    def fail(*_: Any) -> Any:
        raise ModelError("broken on the way")

    monkeypatch.setattr(measures.ModelPlace, "load", load)
    with monkeypatch.context() as patch:
        patch.setattr(measures.RepetitionProbe, "run", fail)
        with pytest.raises(ModelError, match="on the way"):
            run(models, file, data, seqlen=[64])
    assert len(json.loads(file.read_text())["records"]) == 2
    first = run(models, file, data, seqlen=[64])
    assert loads == ["tiny0", "tiny0", "tiny1"]
    before = file.read_bytes()
    assert quality.plain(run(models, file, data, seqlen=[64])) == quality.plain(first)
    assert file.read_bytes() == before
    assert len(loads) == 3, "nothing was missing, nothing was loaded"

    other = run(models[:1], file, data, seqlen=[64], windows=5, perplexity=["wikitext2"], generation=False)
    assert other.found[str(models[0])]["wikitext2@64"]["result"]["windows"] == 5
    assert len(json.loads(file.read_text())["records"]) == 7, "another setting is another record"
    half = run(models[:1], file, data, seqlen=[64], perplexity=["wikitext2"], generation=False, dtype="bfloat16")
    assert half.found[str(models[0])]["wikitext2@64"]["setting"]["dtype"] == "bfloat16"
    assert len(json.loads(file.read_text())["records"]) == 8


def test_a_copy_is_the_same_model_and_a_changed_one_is_not(data: Path, tmp_path: Path) -> None:
    file, ask = tmp_path / "quality.json", {"perplexity": ["c4"], "seqlen": [64], "generation": False}
    a, b = tiny_model(tmp_path / "a", "qwen2"), tiny_model(tmp_path / "b", "qwen2")
    run([a, b], file, data, **ask)
    assert len(json.loads(file.read_text())["records"]) == 1
    tiny_model(tmp_path / "a", "qwen2", seed=9)
    run([a], file, data, **ask)
    assert len(json.loads(file.read_text())["records"]) == 2


def test_a_checkpoint_of_ours(models: list[Path], data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(4000, seed=1))
    words = {"sources": [{"source": str(text)}], "sequences": 4, "length": 64}
    fields = {"calibration": words, "fitness_text": words, "ffn_step": 8, "device": "cpu", "dtype": "float32"}
    made = api.prune(tmp_path / "pruned", rates=[0.1, 0.5, 0.2], cache=tmp_path / "cache", model=str(models[0]), **fields)
    found = selfpruner.quality(
        [made.path], tmp_path / "q.json", perplexity=["wikitext2"], seqlen=[64], against=models[0], data=data
    )
    assert found.models == (str(models[0]), str(made.path))
    record = found.found[str(made.path)]["wikitext2@64"]
    assert record["parameters"] == made.parameters
    tokens = corpora.windows(corpora.corpus("wikitext2", data), tiny_tokenizer(), 64)
    assert record["result"]["outcomes"]["nll"] == pytest.approx(losses(selfpruner.load(made.path), tokens), abs=1e-4)


@pytest.mark.parametrize("content", ["", "{}", '{"format": "other"}', "[1]", '"text"'])
def test_what_is_no_result_file_stays(models: list[Path], data: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "notes.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="Name another file"):
        run(models, file, data)
    assert file.read_text() == content


# -- the benchmark ---------------------------------------------------------------------------------------------------------
def test_the_benchmark_s_page(models: list[Path], data: Path, tmp_path: Path) -> None:
    found = run(models, tmp_path / "q.json", data, seqlen=[64])
    places = {"dense": str(models[0]), "uniform-0.2": str(models[1]), "found-0.2": str(models[1])}
    tables = "\n".join(benchmark.written(found, places))
    assert tables.count("in pairs") == 1
    assert "| wikitext2@64 |" in tables
    page = benchmark.filled("# Title\n<!-- tables -->old<!-- /tables -->\nrest", tables)
    assert page.startswith("# Title\n<!-- tables -->")
    assert page.endswith("<!-- /tables -->\nrest")
    assert "old" not in page
    assert benchmark.filled(page, tables) == page


def test_rows_of_the_benchmark(tmp_path: Path) -> None:
    assert benchmark.place("dense", "m", "evolution", tmp_path, tmp_path) == "m"
    assert benchmark.place("mine=/some/folder", "m", "evolution", tmp_path, tmp_path) == "/some/folder"


# -- tasks without the harness -------------------------------------------------------------------------------------------
TASK = "task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: zeroshot/x.jsonl}}\n"


def task_folder(folder: Path, text: str = TASK) -> Path:
    (folder / "lm_eval_tasks").mkdir()
    (folder / "zeroshot").mkdir()
    (folder / LocalTask.place("x")).write_text(text)
    (folder / "zeroshot/x.jsonl").write_text('{"a": 1}\n')
    return folder


def test_a_local_task_is_known_by_its_content(tmp_path: Path) -> None:
    assert LocalTask.find("x", None) is None
    assert LocalTask.find("x", tmp_path) is None
    found = LocalTask.find("x", task_folder(tmp_path))
    assert found is not None
    first = found.digest
    assert found.digest == first
    assert found.config(tmp_path / "cache")["dataset_kwargs"] == {
        "data_files": {"test": str(tmp_path / "zeroshot/x.jsonl")},
        "cache_dir": str(tmp_path / "cache"),
    }
    (tmp_path / "zeroshot/x.jsonl").write_text('{"a": 2}\n')
    assert found.digest != first


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (TASK + "process_docs: !function utils.process\n", "cannot be read"),  # code is not run
        ("task: x\n", "must name its dataset_kwargs"),
        ("- a\n", "must name its dataset_kwargs"),
        ("a: [", "cannot be read"),
        (TASK.replace("x.jsonl", "y.jsonl"), "is not there"),
    ],
)
def test_a_bad_task_file_is_named(tmp_path: Path, text: str, why: str) -> None:
    task = LocalTask.find("x", task_folder(tmp_path, text))
    assert task is not None
    with pytest.raises(TextError, match=why) as caught:
        _ = task.digest
    assert "local_x.yaml" in caught.value.message


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed here")
def test_without_the_harness_it_says_how_to_get_it(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", str(models[0]), "--tasks", "boolq", "-o", str(tmp_path / "q.json")]) == 2
    assert "pip install 'lm_eval>=0.4.13'" in capsys.readouterr().err
    assert not (tmp_path / "q.json").exists()


# -- the command ---------------------------------------------------------------------------------------------------------
def test_the_command_line(models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "quality.json"
    arguments = [
        "evaluate",
        *map(str, models),
        "--perplexity",
        "wikitext2,c4",
        "--seqlen",
        "64,128",
        "--windows",
        "3",
        "-o",
        str(file),
    ]
    arguments += ["--data", str(data), "--device", "cpu", "--cache", str(tmp_path / "cache")]
    assert cli.run([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["against"] == str(models[0])
    assert [row["name"] for row in printed["rows"]] == ["wikitext2@64", "wikitext2@128", "c4@64", "c4@128"]
    assert len(printed["records"]) == 8
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert "tiny1" in out.splitlines()[0]
    assert "wikitext2@128" in out
    assert "one standard error" in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--perplexity", "wikitext2"], "Name a file"),
        (["--perplexity", "ptb", "-o", "q.json"], "Unknown text 'ptb'"),
        (["--perplexity", "c4", "--seqlen", "a", "-o", "q.json"], "whole numbers"),
        (["--perplexity", "c4", "--seqlen", "1", "-o", "q.json"], "two tokens"),
        (["--perplexity", "c4", "--seqlen", "1024", "-o", "q.json"], "context of 512"),
        (["--perplexity", "c4", "--text", "pydoc", "-o", "q.json"], "of its own"),
        (["again"], "Say what to measure"),
    ],
)
def test_bad_requests(
    models: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], why: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.run(["evaluate", str(models[0]), *arguments, "--data", str(data), "--cache", str(tmp_path / "cache")]) == 2
    err = capsys.readouterr().err
    assert why in err
    assert not (tmp_path / "q.json").exists()


def test_nothing_asked_for(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Say what to measure"):
        api.quality(models, tmp_path / "q.json")
    with pytest.raises(UnknownNameError):
        api.quality(models, tmp_path / "q.json", perplexity=["wikitext"])
