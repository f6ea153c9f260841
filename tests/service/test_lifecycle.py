"""The life of a job is one, on a server and in this process: the same scenarios, the same rows."""

from __future__ import annotations

import _thread
import json
import sqlite3
import threading
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

from selfpruner import api, models
from selfpruner.calibration import files
from selfpruner.cli import app as cli
from selfpruner.client import Client
from selfpruner.errors import BudgetError, DiskFullError, NotFoundError
from selfpruner.jobs import lifecycle
from selfpruner.jobs.lifecycle import JobResult
from selfpruner.jobs.local_jobs import LocalJobs
from selfpruner.records import Recorder
from selfpruner.store.store import Store
from server.settings import ServerSettings
from tests.helpers.serving import BUDGET, CRASHES, DISK, QUICK, SCRIPT, STUBBORN, WAITS_ONCE, quick, running_server

FINISHED = ("succeeded", "failed", "cancelled")


class Runs(Protocol):
    """What runs one job in ``home``. ``at_last_plan`` is called while it runs, when its last plan is in the database."""

    database: Path

    def run(self, seed: int) -> None:
        """Begin the job, or take up the one that is there, and see it through."""

    def interrupt(self, seed: int, at_last_plan: Callable[[], None]) -> None: ...
    def pause(self, seed: int) -> None: ...
    def cancel(self, seed: int) -> None: ...
    def checkpoint(self) -> Path: ...


class OnServer:
    def __init__(self, home: Path, _patch: pytest.MonkeyPatch) -> None:
        self.settings = ServerSettings(home=home)
        self.database = self.settings.database

    def run(self, seed: int) -> None:
        with running_server(self.settings) as server, Client(server.url) as client:
            jobs = client.list()["data"]
            job = jobs[0] if jobs else client.submit({"rate": 0.2, "seed": seed})
            if job["status"] == "paused":
                client.resume(job["id"])
            for _ in client.follow(job["id"]):
                pass

    def interrupt(self, seed: int, at_last_plan: Callable[[], None]) -> None:
        self._while_it_runs(seed, lambda _client, _job: at_last_plan())

    def pause(self, seed: int) -> None:
        self._while_it_runs(seed, lambda client, job: client.pause(job))
        assert job_in(self.database)["status"] == "paused"

    def cancel(self, seed: int) -> None:
        self._while_it_runs(seed, lambda client, job: client.cancel(job))

    def checkpoint(self) -> Path:
        return self.settings.checkpoints / job_in(self.database)["id"]

    def _while_it_runs(self, seed: int, act: Callable[[Client, str], object]) -> None:
        with running_server(self.settings) as server, Client(server.url) as client:
            job = client.submit({"rate": 0.2, "seed": seed})["id"]
            for _, data in client.follow(job):
                if data.get("data", {}).get("plan") == f"{2:016x}":
                    act(client, job)
                    return


class InThisProcess:
    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.database = home / "selfpruner.db"
        self.heard: list[str] = []
        patch.setattr(models, "precheck", lambda _: None)
        patch.setattr(files, "look_at", lambda *_: None)

        async def run_job(config: Any, *, recorder: Recorder, checkpoint_dir: Path, **_: object) -> JobResult:
            return await SCRIPT[config.seed](recorder, checkpoint_dir)

        patch.setattr(api, "run_job", run_job)

    def run(self, seed: int) -> None:
        with suppress(BudgetError, DiskFullError, RuntimeError):
            self._search(seed, lambda _name, _data: None)

    def interrupt(self, seed: int, at_last_plan: Callable[[], None]) -> None:
        def watch(_name: str, data: Mapping[str, Any]) -> None:
            if data.get("data", {}).get("plan") == f"{2:016x}":
                at_last_plan()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self._search(seed, watch)

    def pause(self, seed: int) -> None:
        self.interrupt(seed, lambda: None)
        assert job_in(self.database)["status"] == "queued"

    def cancel(self, seed: int) -> None:
        def refused() -> None:
            assert cli.run(["cancel", str(self.home)]) == 1, "it is running"

        self.interrupt(seed, refused)
        assert cli.run(["cancel", str(self.home)]) == 0

    def checkpoint(self) -> Path:
        return self.home / "checkpoint"

    def _search(self, seed: int, watch: Callable[[str, Mapping[str, Any]], None]) -> None:
        api.search(0.2, self.home, seed=seed, preset="evolution", cache=self.home / "cache", watch=watch, progress=False)


def job_in(database: Path) -> dict[str, Any]:
    with Store(database, read_only=True) as store:
        (job,) = store.jobs().data
        return job.model_dump()


@pytest.fixture(params=[OnServer, InThisProcess])
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Runs]:
    return lambda name: request.param(tmp_path / name, monkeypatch)


def killed(runs: Callable[[str], Runs], seed: int) -> Runs:
    """What is left of a process that is killed while the job runs: its database as it is at that moment."""
    first, second = runs("first"), runs("second")

    def copy() -> None:
        second.database.parent.mkdir(parents=True)
        with closing(sqlite3.connect(first.database)) as source, closing(sqlite3.connect(second.database)) as target:
            source.backup(target)

    first.interrupt(seed, copy)
    assert job_in(second.database)["status"] == "running"
    second.run(seed)
    return second


def paused(runs: Callable[[str], Runs], seed: int) -> Runs:
    runner = runs("home")
    runner.pause(seed)
    runner.run(seed)
    return runner


def cancelled(runs: Callable[[str], Runs], seed: int) -> Runs:
    runner = runs("home")
    runner.cancel(seed)
    return runner


def to_the_end(runs: Callable[[str], Runs], seed: int) -> Runs:
    runner = runs("home")
    runner.run(seed)
    return runner


@pytest.mark.parametrize(
    ("life", "seed", "status", "code"),
    [
        (to_the_end, QUICK, "succeeded", None),
        (to_the_end, BUDGET, "failed", "budget_unreachable"),
        (to_the_end, DISK, "failed", "disk_full"),
        (to_the_end, CRASHES, "failed", "internal_error"),
        (cancelled, WAITS_ONCE, "cancelled", None),
        (paused, WAITS_ONCE, "succeeded", None),
        (killed, WAITS_ONCE, "succeeded", None),
    ],
)
def test_one_life(
    life: Callable[[Callable[[str], Runs], int], Runs], seed: int, status: str, code: str | None, runs: Callable[[str], Runs]
) -> None:
    runner = life(runs, seed)
    job = job_in(runner.database)
    assert (job["status"], (job["error"] or {}).get("code")) == (status, code)
    assert (job["result"] is not None) == (status == "succeeded")
    with Store(runner.database, read_only=True) as store:
        kinds = [event.type for event in store.events(job["id"], limit=1000).data]
        assert kinds[-1] == f"job.{status}"
        assert kinds.count("candidate.evaluated") == (3 if seed in (QUICK, WAITS_ONCE) else 0), "nothing twice"
        assert len(store.checkpoints(job["id"])) == (status == "succeeded")
    assert runner.checkpoint().exists() == (status == "succeeded"), "no partial folder is left"


def test_jobs_of_a_folder_are_shown_as_a_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    here = InThisProcess(home, monkeypatch)
    here.run(QUICK)
    here.interrupt(WAITS_ONCE, lambda: None)
    capsys.readouterr()

    def printed(*line: str, code: int = 0) -> str:
        assert cli.run([*line]) == code
        return capsys.readouterr().out

    newest, oldest = json.loads(printed("jobs", str(home), "--json"))["data"]
    assert [(job["status"], job["config"]["seed"]) for job in (newest, oldest)] == [("queued", WAITS_ONCE), ("succeeded", QUICK)]
    assert newest["id"] in printed("jobs", str(home), "--status", "queued")
    assert newest["id"] in printed("show", str(home))
    assert str(home / "checkpoint") in printed("show", str(home / "selfpruner.db"), "--job", oldest["id"])
    assert json.loads(printed("show", str(home), "--json")) == newest
    kinds = [json.loads(line)["type"] for line in printed("events", str(home), "--job", oldest["id"], "--json").splitlines()]
    assert (kinds[0], kinds[-1]) == ("job.queued", "job.succeeded")
    assert printed("show", "-f", str(home), code=1) == ""
    printed("resume", str(home), "--job", oldest["id"], code=2)
    printed("resume", str(home), "--cache", str(home / "cache"), "--json")
    assert [job["status"] for job in json.loads(printed("jobs", str(home), "--json"))["data"]] == ["succeeded", "succeeded"]
    printed("show", str(tmp_path / "nothing"), "--job", oldest["id"], code=2)
    with LocalJobs(home) as jobs:
        followed = list(jobs.follow(oldest["id"]))
        assert [name for name, _ in followed if name != "job"] == kinds
        assert followed[-1] == ("job", oldest)
        assert next(row["id"] for row in jobs.candidates(oldest["id"], "fitness")) == f"{2:016x}"
    with pytest.raises(NotFoundError, match="no database"):
        LocalJobs(tmp_path)


def test_a_search_that_was_killed_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shown as that, following it ends, and `resume` goes on with the newest that waits."""
    first, home = InThisProcess(tmp_path / "first", monkeypatch), tmp_path / "home"

    def kill() -> None:
        assert json.loads(printed("jobs", str(first.home), "--status", "running", "--json"))["data"]
        home.mkdir()
        for target in (home / "selfpruner.db", home / "copy.db"):
            with closing(sqlite3.connect(first.database)) as source, closing(sqlite3.connect(target)) as copy:
                source.backup(copy)

    def printed(*line: str, code: int = 0) -> str:
        assert cli.run([*line]) == code
        return capsys.readouterr().out

    first.interrupt(WAITS_ONCE, kill)
    second = InThisProcess(home, monkeypatch)
    job = job_in(second.database)["id"]
    (shown,) = json.loads(printed("jobs", str(home), "--json"))["data"]
    assert shown["status"] == "interrupted"
    assert job in printed("jobs", str(home), "--status", "interrupted")
    assert job not in printed("jobs", str(home), "--status", "running")
    assert "interrupted" in printed("show", str(home))
    capsys.readouterr()
    for command in ("show", "events"):
        assert cli.run([command, "-f", str(home)]) == 1
        assert f"is interrupted and does not run; go on with it: selfpruner resume {home} --job {job}" in capsys.readouterr().err
    assert job_in(second.database)["status"] == "running", "nothing was written"
    for command in ("resume", "cancel"):
        assert cli.run([command, str(home / "copy.db")]) == 2
        assert "is another database: it is only read" in capsys.readouterr().err
    with Store(second.database) as store:
        config = store.job(job).config
        store.requeue_running()
    second.run(QUICK)
    with LocalJobs(home) as jobs:
        assert jobs.newest() != jobs.newest(waiting=True) == job
    printed("resume", str(home), "--cache", str(home / "cache"))
    with Store(second.database, read_only=True) as store:
        assert (store.job(job).status, store.job(job).config) == ("succeeded", config)


def test_ctrl_c_while_watching_a_folder_names_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = InThisProcess(tmp_path / "home", monkeypatch)
    here.run(QUICK)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalJobs, "follow", interrupted)
    assert cli.run(["show", "-f", str(here.home)]) == 130
    job = job_in(here.database)["id"]
    assert f"selfpruner show -f {here.home} --job {job}" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["job.queued", "job.running", "candidate.evaluated", "job.succeeded"])
def test_what_watch_raises_reaches_the_caller(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = InThisProcess(tmp_path / "home", monkeypatch)

    def watch(name: str, _data: object) -> None:
        if name == at:
            raise LookupError("the caller's own")

    with pytest.raises(LookupError, match="the caller's own"):
        here._search(QUICK if at == "job.succeeded" else WAITS_ONCE, watch)
    assert job_in(here.database)["status"] == ("succeeded" if at == "job.succeeded" else "queued")


def test_a_servers_job_is_left_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a client sends does not say what is deleted, or where a search goes on, in a server's home."""
    victim, home = tmp_path / "victim", tmp_path / "home"
    victim.mkdir()
    settings = ServerSettings(home=home)
    with running_server(settings) as server, Client(server.url) as client:
        job = client.submit({"rate": 0.2, "seed": WAITS_ONCE, "preset": "evolution"}, metadata={"checkpoint": str(victim)})["id"]
        for _, data in client.follow(job):
            if data.get("data", {}).get("plan") == f"{2:016x}":
                break
        client.pause(job)
    with Store(settings.database) as store:
        store.transition(job, "queued")
    (home / "checkpoint").mkdir()
    (settings.checkpoints / job).mkdir(exist_ok=True)
    for command in ("cancel", "resume"):
        assert cli.run([command, str(home), "--job", job]) == 2
        assert "is a server's. Start that with `selfpruner serve --home`" in capsys.readouterr().err
    assert [place.is_dir() for place in (victim, home / "checkpoint", settings.checkpoints / job)] == [True] * 3
    assert job_in(settings.database)["status"] == "queued"
    (home / "checkpoint").rmdir()
    monkeypatch.setitem(SCRIPT, WAITS_ONCE, quick)
    InThisProcess(home, monkeypatch).run(WAITS_ONCE)  # the same config, and still another search
    with Store(settings.database, read_only=True) as store:
        assert [(row.status, row.checkpoint_number) for row in store.jobs().data] == [("succeeded", 1), ("queued", None)]
        assert store.job(job).user_metadata == {"checkpoint": str(victim)}


def test_what_watches_hears_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages of ``watch`` are those that a server sends of the same job."""
    heard: list[tuple[str, Any]] = []
    here = InThisProcess(tmp_path / "here", monkeypatch)
    here._search(QUICK, lambda name, data: heard.append((name, dict(data))))
    with running_server(ServerSettings(home=tmp_path / "there")) as server, Client(server.url) as client:
        sent = list(client.follow(client.submit({"rate": 0.2, "seed": QUICK, "preset": "evolution"})["id"]))
    for messages in (heard, sent):
        assert messages[-1][0] == "job"
        assert messages[-1][1]["status"] == "succeeded"
    events = [[{**data, "created_at": 0} for name, data in messages if name != "job"] for messages in (heard, sent)]
    assert events[0] == events[1]
    assert heard[-1][1].keys() == sent[-1][1].keys()


def test_ctrl_c_queues_a_job_whatever_its_search_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the search begins, and while it does not stop."""
    here = InThisProcess(tmp_path / "early", monkeypatch)

    def at_once(_name: str, _data: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here._search(QUICK, at_once)
    assert job_in(here.database)["status"] == "queued"

    late = InThisProcess(tmp_path / "late", monkeypatch)
    monkeypatch.setattr(lifecycle, "STOP_SECONDS", 0.1)
    timer = threading.Timer(1.0, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        late._search(STUBBORN, lambda _name, _data: None)
    timer.join()
    assert job_in(late.database)["status"] == "queued"
