"""Tasks through lm-evaluation-harness: the numbers of its own model class, its own accuracies and errors. `make test-evaluate`."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed here; run `make test-evaluate`")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from selfpruner import api, catalogue  # noqa: E402
from selfpruner.cli import app as cli  # noqa: E402
from selfpruner.errors import ConfigError, TextError  # noqa: E402
from selfpruner.judging import harness, measures  # noqa: E402
from selfpruner.judging.task_files import LocalTask  # noqa: E402
from selfpruner.testing.tiny_models import WORDS, tiny_model  # noqa: E402

COMMON = "dataset_path: json\ntest_split: test\nnum_fewshot: 0\n"
FORMS = {
    # Four choices after a context, two after another, and two contexts before one ending, as the seven tasks have them.
    "choices": (
        "output_type: multiple_choice",
        '"Question: {{question}}\\nAnswer:"',
        "label",
        '"{{options}}"',
        ("acc", "acc_norm"),
    ),
    "yes_no": ("output_type: multiple_choice", '"{{question}}?"', "label", '["no", "yes"]', ("acc",)),
    "endings": (
        "output_type: multiple_choice",
        '"{{label % 2}}"',
        '"{{question}}"',
        "\"{{['the ' + options[0], 'a ' + options[1]]}}\"",
        ("acc",),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    (folder / "lm_eval_tasks").mkdir()
    (folder / "zeroshot").mkdir()

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(low, high)))

    for name, (kind, text, target, choice, metrics) in FORMS.items():
        count = 4 if name == "choices" else 2
        rows = [
            {"question": words(3, 20), "options": [words(1, 6) for _ in range(count)], "label": rng.randrange(count)}
            for _ in range(40)
        ]
        (folder / f"zeroshot/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        listed = "".join(f"  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}\n" for metric in metrics)
        (folder / LocalTask.place(name)).write_text(
            f"task: local_{name}\n{COMMON}dataset_kwargs: {{data_files: {{test: zeroshot/{name}.jsonl}}}}\n{kind}\n"
            f"doc_to_text: {text}\ndoc_to_target: {target}\ndoc_to_choice: {choice}\nmetric_list:\n{listed}"
        )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def subject(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> measures.MeasuredModel:
    return measures.ModelPlace(str(folder), tmp_path_factory.mktemp("cache"), torch.device("cpu"), "float32").load()


def theirs(subject: measures.MeasuredModel, batch_size: int = 3) -> Any:
    with harness._hushed():
        return HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size)


def loaded(name: str, data: Path, subject: measures.MeasuredModel) -> Any:
    return harness.load_task(name, LocalTask.find(name, data), subject.cache)


def check(name: str, data: Path, subject: measures.MeasuredModel, limit: int | None) -> None:
    """The same answers to every request, and the same metrics for every document, as the harness's own class gives one by one."""
    answers, outcomes = [], []
    for model in (harness.SharedContextLM(subject.model, subject.tokenizer), theirs(subject)):
        task = loaded(name, data, subject)
        outcomes.append(harness.run(task, name, model, limit))
        answers.append([instance.resps[0] for instance in task.instances])
    ours, reference = answers
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in reference], abs=1e-3, rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in reference]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", FORMS)
def test_the_numbers_are_the_harness_s(name: str, data: Path, subject: measures.MeasuredModel) -> None:
    check(name, data, subject, None)


@pytest.mark.parametrize("name", catalogue.ZERO_SHOT_TASKS)
def test_the_seven_tasks(name: str, subject: measures.MeasuredModel) -> None:
    root = os.environ.get("SELFPRUNER_DATA")
    if not root or LocalTask.find(name, Path(root)) is None:
        pytest.skip(f"needs {LocalTask.place(name)} in SELFPRUNER_DATA")
    check(name, Path(root), subject, 12)


def test_accuracies_and_errors_are_the_harness_s(data: Path, folder: Path, subject: measures.MeasuredModel, tmp_path: Path) -> None:
    found = api.quality(
        [folder], tmp_path / "q.json", tasks=list(FORMS), data=data, device="cpu", dtype="float32", cache=subject.cache
    ).found[str(folder)]
    for name in FORMS:
        task = loaded(name, data, subject)
        with harness._hushed():
            result = lm_eval.evaluate(theirs(subject), {"tasks": {f"local_{name}": task}}, log_samples=False)["results"][
                f"local_{name}"
            ]
        own = found[name]["result"]
        for metric in FORMS[name][4]:
            assert own[metric] == pytest.approx(result[f"{metric},none"], abs=1e-6)
            assert own[f"{metric}_stderr"] == pytest.approx(result[f"{metric}_stderr,none"], abs=1e-6)
            assert own["outcomes"][metric].count("1") == round(40 * own[metric])
        assert (own["documents"], own["of"]) == (40, 40)


def test_long_prompts_are_cut_as_the_harness_cuts_them(data: Path, subject: measures.MeasuredModel) -> None:
    results = []
    for model in (harness.SharedContextLM(subject.model, subject.tokenizer), theirs(subject)):
        model._max_length = 24
        task = loaded("choices", data, subject)
        harness.run(task, "choices", model, 10)
        results.append([instance.resps[0][0] for instance in task.instances])
    assert results[0] == pytest.approx(results[1], abs=1e-3)


def test_a_limit_takes_the_same_documents_every_time(data: Path, subject: measures.MeasuredModel) -> None:
    assert harness.subset("boolq", 100, 10) == harness.subset("boolq", 100, 10)
    assert set(harness.subset("boolq", 100, 10)) < set(harness.subset("boolq", 100, 20))
    assert harness.subset("boolq", 100, 10) != harness.subset("piqa", 100, 10) != list(range(10))
    model = harness.SharedContextLM(subject.model, subject.tokenizer)
    whole = harness.run(loaded("choices", data, subject), "choices", model)
    part = harness.run(loaded("choices", data, subject), "choices", model, 7)
    chosen = harness.subset("choices", 40, 7)
    assert part.total == 40
    assert part.metrics == {metric: [values[index] for index in chosen] for metric, values in whole.metrics.items()}


def test_results_are_kept_by_task_and_setting(data: Path, folder: Path, subject: measures.MeasuredModel, tmp_path: Path) -> None:
    file = tmp_path / "q.json"
    ask = {"data": data, "device": "cpu", "cache": subject.cache}
    api.quality([folder], file, tasks=["yes_no"], limit=8, **ask)
    api.quality([folder], file, tasks=["yes_no", "choices"], limit=8, **ask)
    api.quality([folder], file, tasks=["yes_no"], limit=9, **ask)
    kept = [(r["measure"], r["setting"]["limit"]) for r in json.loads(file.read_text())["records"]]
    assert kept == [("yes_no", 8), ("choices", 8), ("yes_no", 9)]


def test_the_table_has_both_means(data: Path, folder: Path, subject: measures.MeasuredModel, tmp_path: Path) -> None:
    found = api.quality([folder], tmp_path / "q.json", tasks=list(FORMS), data=data, device="cpu", cache=subject.cache)
    rows = {row.name: row.cells[0].value.value for row in found.rows}
    acc = [rows[f"{name} acc"] for name in FORMS]
    assert rows["mean of 3 acc"] == pytest.approx(sum(acc) / 3)
    assert rows["mean of 3 acc_norm"] == pytest.approx((rows["choices acc_norm"] + sum(acc[1:])) / 3)


def test_what_cannot_be_had_is_said(data: Path, subject: measures.MeasuredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="Did you mean 'boolq'"):
        harness.load_task("boolqq", None, subject.cache)
    with pytest.raises(TextError, match=r"local_boolq\.yaml with --data or SELFPRUNER_DATA"):
        harness.load_task("boolq", None, subject.cache)
    (data / LocalTask.place("written")).write_text(
        (data / LocalTask.place("yes_no")).read_text().replace("multiple_choice", "generate_until").replace("doc_to_choice", "x_")
    )
    with pytest.raises((ConfigError, TextError)):
        loaded("written", data, subject)


def test_the_command_prints_nothing_of_the_harness(
    data: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(folder), "--tasks", "choices,endings", "--data", str(data), "-o", str(tmp_path / "q.json")]
    assert cli.run([*arguments, "--device", "cpu", "--cache", str(tmp_path / "cache")]) == 0
    out, err = capfd.readouterr()
    assert "endings acc" in out
    assert err  # what is being done; every line of it is ours
    assert all(" · " in line for line in err.splitlines()), err
