"""Searches in a folder: what a finished one gives, what another one may not do, and what is refused before anything is computed."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from selfpruner import api, models
from selfpruner.cli import app as cli
from selfpruner.errors import (
    ConfigError,
    ConflictError,
    DiskFullError,
    ExportError,
    ModelNotFoundError,
    NoPermissionError,
    TextError,
)
from selfpruner.export import checkpoint
from selfpruner.files import places
from selfpruner.jobs.handler import ServedSessionHandler, SessionHandler
from selfpruner.jobs.lifecycle import JobResult
from selfpruner.store.store import Store
from selfpruner.workers.tasks import R, TaskRequest
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def fields(tiny_llama: Path, sample_text: Callable[[int, int], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
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
        "generations": 0,
        "surveys": 0,
        "generation_probe": False,
        "stages": [{"tokens": 64, "keep": 2}],
        "final_tokens": 64,
        "device": "cpu",
        "dtype": "float32",
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(fields: dict[str, Any], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JobResult]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, api.search(0.2, folder, cache=cache, **fields)


@pytest.fixture
def run(finished: tuple[Path, JobResult], tmp_path: Path) -> Path:
    """A folder of its own with the finished search."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be computed."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(api, "_with_pool", refuse)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kinds of the tasks that a worker is asked for."""
    kinds: list[str] = []
    handle = SessionHandler.handle

    def count(self: SessionHandler, session: Any, request: TaskRequest[R], *rest: Any) -> R:
        kinds.append(request.kind)
        return handle(self, session, request, *rest)

    monkeypatch.setattr(SessionHandler, "handle", count)
    return kinds


def rows(folder: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(folder / "selfpruner.db")) as connection:
        return connection.execute(query).fetchall()


# -- the same again ----------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_work")
def test_a_finished_search_gives_what_it_found(
    run: Path, finished: tuple[Path, JobResult], fields: dict[str, Any], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, result = rows(run, "SELECT * FROM population"), finished[1]
    (run / "result.json").unlink()
    again = api.search(0.2, run, cache=cache, **fields)
    assert (again.reused, result.reused) == (True, False)
    assert again.report == json.loads((run / "result.json").read_text())
    assert again.checkpoint == {key: result.checkpoint[key] for key in again.checkpoint} | {"path": str(run / "checkpoint")}
    assert rows(run, "SELECT * FROM population") == before
    assert rows(run, "SELECT count(*) FROM job") == [(1,)]

    config = run / "config.json"
    config.write_text(json.dumps(fields))
    assert cli.run(["search", "-c", str(config), "--rate", "0.2", "-o", str(run), "--cache", str(cache)]) == 0
    shown = capsys.readouterr()
    assert f"checkpoint {run / 'checkpoint'}" in shown.out
    assert "nothing was computed. --again" in shown.err


@pytest.mark.usefixtures("no_work")
def test_a_finished_search_is_shown_when_its_model_is_gone(
    run: Path, fields: dict[str, Any], cache: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str) -> None:
        assert name == str(tiny_llama)
        raise ModelNotFoundError("The model is gone.", param="model")

    monkeypatch.setattr(models, "precheck", gone)
    assert api.search(0.2, run, cache=cache, **fields).reused
    with pytest.raises(ModelNotFoundError):
        api.search(0.3, run, cache=cache, again=True, **fields)
    assert rows(run, "SELECT count(*) FROM job") == [(1,)]


def test_other_settings_are_a_second_search_beside_it(run: Path, fields: dict[str, Any], cache: Path) -> None:
    kept = (run / "checkpoint" / "manifest.json").read_bytes(), (run / "result.json").read_bytes()
    other = api.search(0.3, run, cache=cache, **fields)
    assert kept == ((run / "checkpoint" / "manifest.json").read_bytes(), (run / "result.json").read_bytes())
    assert Path(other.checkpoint["path"]) == run / "checkpoint-2"
    assert json.loads((run / "result-2.json").read_text())["target"]["rate"] == 0.3
    for rate, place in ((0.2, "checkpoint"), (0.3, "checkpoint-2")):  # both are there now, and either is had again
        found = api.search(rate, run, cache=cache, **fields)
        assert found.reused
        assert Path(found.checkpoint["path"]) == run / place
        assert found.report["target"]["rate"] == rate

    jobs = [job for (job,) in rows(run, "SELECT id FROM job ORDER BY number")]
    assert rows(run, "SELECT job_id FROM newest") == [(jobs[1],)]
    readme = re.findall(r"^    (SELECT .*?;)$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(readme) == 6
    for query in readme:
        of_newest, of_both = rows(run, query), rows(run, query.replace("IN newest", "IS NOT NULL"))
        assert "llm_cost" in query or 0 < len(of_newest) <= len(of_both), query
        assert rows(run, query.replace("IN newest", f"= '{jobs[1]}'")) == of_newest
    for (view,) in rows(run, "SELECT name FROM sqlite_master WHERE type = 'view'"):
        assert "job_id" in [column[1] for column in rows(run, f"PRAGMA table_info({view})")], view


def test_a_lost_checkpoint_is_made_again_from_what_was_computed(
    run: Path, finished: tuple[Path, JobResult], fields: dict[str, Any], cache: Path, counted: list[str]
) -> None:
    shutil.rmtree(run / "checkpoint")
    again = api.search(0.2, run, cache=cache, **fields)
    assert "evaluate" not in counted
    assert (again.reused, again.checkpoint["manifest_sha256"] is None) == (False, False)
    assert again.checkpoint["plan_hash"] == finished[1].checkpoint["plan_hash"]
    assert rows(run, "SELECT count(*), status FROM job") == [(1, "succeeded")]
    assert api.search(0.2, run, cache=cache, **fields).reused


def test_a_search_that_failed_is_taken_over(
    fields: dict[str, Any], cache: Path, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ExportError("The disk went away.")

    with monkeypatch.context() as patch:
        patch.setattr(SessionHandler, "_export", broken)
        with pytest.raises(ExportError):
            api.search(0.2, tmp_path / "run", cache=cache, **fields)
    assert "evaluate" in counted
    counted.clear()
    result = api.search(0.2, tmp_path / "run", cache=cache, **fields)
    assert "evaluate" not in counted
    assert Path(result.checkpoint["path"]) == tmp_path / "run" / "checkpoint"
    assert [status for (status,) in rows(tmp_path / "run", "SELECT status FROM job ORDER BY number")] == ["failed", "succeeded"]
    with Store(tmp_path / "run" / "selfpruner.db") as store:
        old, new = (store.evaluations(job.id) for job in reversed(store.jobs().data))
        assert {(row.plan_hash, row.window, row.kl) for row in old} <= {(row.plan_hash, row.window, row.kl) for row in new}
        before, after = ({row.name: row for row in store.recorder(job.id).find_stages()} for job in reversed(store.jobs().data))
        assert after["scoring"].tokens == before["scoring"].tokens > 0, "what it took goes along with what came of it"
        assert after["other"].seconds > before["other"].seconds


@pytest.mark.usefixtures("no_work")
def test_a_search_that_has_not_finished_goes_on_beside_others(run: Path, fields: dict[str, Any], cache: Path) -> None:
    with closing(sqlite3.connect(run / "selfpruner.db")) as connection, connection:
        connection.execute("UPDATE job SET status = 'running', finished_at = NULL, result = NULL")  # its process was killed
    for rate in (0.25, 0.2, 0.25, 0.2):
        with pytest.raises(AssertionError, match="computed"):
            api.search(rate, run, cache=cache, **fields)
    assert rows(run, "SELECT json_extract(config, '$.rate'), status FROM job ORDER BY number") == [
        (0.2, "queued"),
        (0.25, "queued"),
    ]
    assert rows(run, "SELECT checkpoint_number, metadata FROM job ORDER BY number") == [(1, "{}"), (2, "{}")]


# -- before anything is computed ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_work")
def test_prune_looks_at_its_folder_first(run: Path, fields: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for place, error, says in (
        (run / "checkpoint", ConflictError, "made otherwise: rate 0.2 then, 0.3 now"),
        (tmp_path / "full", ExportError, "is not empty and no checkpoint"),
        (tmp_path / "file", ConfigError, "is a file"),
        (tmp_path / "file" / "below", ConfigError, f"because {tmp_path / 'file'} is a file"),
    ):
        with pytest.raises(error, match=says):
            api.prune(place, rate=0.3, cache=cache, **fields)
    with pytest.raises(ConfigError, match="is a file"):
        api.search(0.3, tmp_path / "file", cache=cache, **fields)
    (tmp_path / "full" / "checkpoint").write_text("mine")
    with pytest.raises(ConfigError, match=r"no search in .* made it"):
        api.search(0.3, tmp_path / "full", cache=cache, **fields)
    ((second,),) = rows(run, "SELECT plan FROM population WHERE rank = 2")
    with pytest.raises(ConflictError, match="made otherwise: plan_hash"):
        api.export(run, run / "checkpoint", plan=second, cache=cache)
    with pytest.raises(ExportError, match="is not empty"):
        api.export(run, tmp_path / "full", format="gguf", cache=cache)


@pytest.mark.usefixtures("no_work")
def test_a_folder_that_cannot_be_written_is_named(
    fields: dict[str, Any], cache: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **how: Any) -> None:
        raise PermissionError(13, "Permission denied", str(how["dir"]))

    monkeypatch.setattr("selfpruner.files.places.tempfile.TemporaryDirectory", closed)
    calls: list[Callable[[Path], object]] = [
        lambda place: api.search(0.2, place, cache=cache, **fields),
        lambda place: api.prune(place, rate=0.2, cache=cache, **fields),
        lambda place: api.export(run, place, cache=cache),
        lambda place: api.quality([run / "checkpoint"], place, generation=True, cache=cache),
    ]
    for call in calls:
        with pytest.raises(NoPermissionError, match=f"{tmp_path} is closed to this user"):
            call(tmp_path / "new")
    for command in (["benchmark", "m"], ["compare", "--rates", "0.2", "-m", fields["model"]], ["export", "job_1"]):
        assert cli.run([*command, "-o", str(tmp_path / "new")]) == 1
    assert not (tmp_path / "new").exists()


def test_texts_are_looked_at_before_the_model(fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("a model was fetched, converted or read")

    monkeypatch.setattr("selfpruner.models.resolve", fetched)
    wrong = tmp_path / "model.raw"
    wrong.write_bytes(b"GGUF" + b"\0" * 100)
    text = {"sources": [{"source": str(wrong)}], "sequences": 4, "length": 64}
    for field, call in (
        ("calibration", lambda: api.prune(tmp_path / "o", rate=0.2, cache=tmp_path / "c", **{**fields, "calibration": text})),
        ("report_text", lambda: api.search(0.2, tmp_path / "o", cache=tmp_path / "c", **{**fields, "report_text": text})),
        ("text", lambda: api.evaluate(fields["model"], text=[str(wrong)], cache=tmp_path / "c")),
    ):
        with pytest.raises(TextError, match="a model, not text") as caught:
            call()
        assert caught.value.param == field
    assert [path.name for path in tmp_path.iterdir()] == ["model.raw"]


@pytest.mark.parametrize("name", ["n" * 300, "q\udcff", "a\0b"])
def test_folders_whose_names_cannot_be(name: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfpruner.models.resolve", lambda *_, **__: pytest.fail("a model was read"))
    calls: list[Callable[[Path], object]] = [
        lambda place: api.search(0.2, place, cache=tmp_path / "c", **fields),
        lambda place: api.prune(place, rate=0.2, cache=tmp_path / "c", **fields),
        lambda place: api.prune(tmp_path / "o", rate=0.2, cache=place, **fields),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="Name another folder"):
            call(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_every_model_is_looked_at_before_one_is_measured(
    fields: dict[str, Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded or fetched")

    monkeypatch.setattr(checkpoint, "opened", loaded)
    for name in ("selfpruner.models.resolve", "selfpruner.jobs.comparison.measure"):
        monkeypatch.setattr(name, loaded)
    (tmp_path / "text.txt").write_text("Some words. " * 1000)
    missing, text, cache = str(tmp_path / "missing"), [str(tmp_path / "text.txt")], tmp_path / "c"
    for call in (
        lambda: api.evaluate(run / "checkpoint", text=text, against=missing, cache=cache),
        lambda: api.evaluate(missing, text=text, against=fields["model"], cache=cache),
        lambda: api.quality([run / "checkpoint", missing], tmp_path / "q.json", generation=True, cache=cache),
        lambda: api.quality([fields["model"]], tmp_path / "q.json", generation=True, against=missing, cache=cache),
    ):
        with pytest.raises(ModelNotFoundError, match=r"There is no model .*missing"):
            call()
    assert cli.run(["compare", "-m", missing, "--rates", "0.2", "-o", str(tmp_path / "compare"), "--calibration", *text]) == 2
    assert "There is no model" in capsys.readouterr().err


def test_a_disk_without_room_is_found_before_the_work(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1 << 20))
    with pytest.raises(DiskFullError, match=r"The checkpoint will take about .* in .*, and only 1 MiB are free there"):
        api.prune(tmp_path / "o", rate=0.2, cache=tmp_path / "c", **fields)
    assert not (tmp_path / "c" / "statistics").exists()


# -- whose variables these are -----------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_work")
def test_a_local_search_does_not_read_a_servers_settings(
    run: Path, fields: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "HOST": "0.0.0.0",
        "PORT": "many",
        "TOKENS": "not json",
        "DEVICES": "gpu",
        "MODEL_ROOT": "/no/such/folder",
        "TEXT_ROOT": "/no/such/folder",
        "PROPOSERS": "{not json",
    }.items():
        monkeypatch.setenv(f"SELFPRUNER_{name}", value)
    config = run / "config.json"
    config.write_text(json.dumps(fields))
    command = ["search", "-c", str(config), "--rate", "0.2", "-o", str(run), "--cache", str(cache)]
    assert cli.run(command) == 0
    own, served = SessionHandler("cpu"), ServedSessionHandler("cpu")
    assert (own.model_root, own.text_root) == (None, None), "a server's bounds are a server's"
    assert served.model_root == served.text_root == Path("/no/such/folder")
    # Where an LLM is asked its variable matters, and no other.
    capsys.readouterr()
    assert cli.run([*command, "-s", "preset=default"]) == 2
    assert "SELFPRUNER_PROPOSERS is not JSON" in capsys.readouterr().err
    monkeypatch.setenv("SELFPRUNER_PROPOSERS", '{"gpt": {"kind": "openai", "model": "gpt-4o"}}')
    assert cli.run([*command, "-s", "preset=default", "-s", "proposer=gtp"]) == 2
    assert "Did you mean 'gpt'" in capsys.readouterr().err
