"""The whole service: real processes, real HTTP, a real (tiny) model. Nothing in the server is replaced.

Start and stop, then whole jobs: with a scripted OpenAI-compatible server, with the local model as its own proposer, and the same
search undisturbed and with its worker killed, its server killed and a pause, which must find the same.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from selfpruner.client import Client
from selfpruner.errors import ConfigError, ModelError
from selfpruner.files import manifest
from selfpruner.workers.lifeline import tied
from tests.helpers.fake_openai import FakeOpenAI

KEY = "sk-a-secret-that-must-not-leak"
RSS_LIMIT = 150 * 2**20


class Service:
    """A server process. ``url`` and ``client`` once it is ready."""

    def __init__(self, home: Path, **environment: str) -> None:
        # Nothing of the outside environment but what a process needs: no token, no home folder of somebody's own.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SELFPRUNER_")}
        self.home = home
        with (home.parent / f"{home.name}.stderr").open("a") as errors:
            self.process = subprocess.Popen(
                tied("-m", "selfpruner", "serve", "--port", "0", "--json"),
                env={**clean, "SELFPRUNER_HOME": str(home), "SELFPRUNER_DEVICES": "cpu", **environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log
        self.url = json.loads(line)["url"]
        assert httpx.get(f"{self.url}/healthz", trust_env=False, timeout=20).json()["status"] == "ok"
        self.client = Client(self.url, timeout=60)

    @property
    def log(self) -> str:
        return (self.home.parent / f"{self.home.name}.stderr").read_text()

    @property
    def database(self) -> Path:
        return self.home / "selfpruner.db"

    def sql(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as database:
            return database.execute(query, arguments).fetchall()

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "selfpruner.workers.child" in " ".join(child.cmdline())]

    def end(self, signal_number: int = signal.SIGTERM, seconds: float = 20) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        code = self.process.wait(seconds)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextmanager
def service(home: Path, **environment: str) -> Iterator[Service]:
    running = Service(home, **environment)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.end(signal.SIGKILL)
        else:
            running.end()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.02)
    return found


# -- the process -------------------------------------------------------------------------------------------------------
def test_start_and_stop(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with service(home) as first:
        process = psutil.Process(first.process.pid)
        # It must answer within two seconds of its start; processor time does not depend on what else the machine does.
        assert process.cpu_times().user + process.cpu_times().system < 2
        assert process.memory_info().rss < RSS_LIMIT
        assert not [m.path for m in process.memory_maps() if "libtorch" in m.path]
        assert home.stat().st_mode & 0o077 == 0

        second = subprocess.run(
            [sys.executable, "-m", "selfpruner", "serve", "--port", "0", "--home", str(home)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 1
        assert second.stderr.count("\n") == 1
        assert f"Another process (pid {first.process.pid})" in second.stderr

        port = first.url.rsplit(":", 1)[1]
        taken = subprocess.run(
            [sys.executable, "-m", "selfpruner", "serve", "--port", port, "--home", str(tmp_path / "other")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert taken.returncode == 2
        assert f"Cannot listen on 127.0.0.1 port {port}" in taken.stderr
        begun = time.monotonic()
        assert first.end(signal.SIGTERM) == 0
        assert time.monotonic() - begun < 10
    with service(home) as again:
        assert again.end(signal.SIGINT) == 130


def test_an_open_event_stream_does_not_hold_the_server(tmp_path: Path, tiny_llama: Path) -> None:
    """Queued and running jobs survive SIGTERM and SIGKILL; nothing that was acknowledged is lost."""
    home = tmp_path / "home"
    with service(home, SELFPRUNER_MODEL_ROOT=str(tiny_llama.parent)) as first:
        jobs = [first.client.submit({"model": tiny_llama.name, "rate": 0.3})["id"] for _ in range(3)]
        with httpx.stream(
            "GET", f"{first.url}/v1/jobs/{jobs[0]}/events", headers={"accept": "text/event-stream"}, trust_env=False
        ) as stream:
            lines = stream.iter_lines()
            wait_for(lambda: "job.running" in next(lines), "running job")
            assert first.end() == 0
        assert {status for (status,) in first.sql("SELECT status FROM job")} == {"queued"}
    with service(home) as second:
        assert second.end(signal.SIGKILL) == -signal.SIGKILL
    with service(home) as third:
        assert [job["id"] for job in third.client.list()["data"]] == jobs[::-1]
        for job in reversed(jobs):
            assert third.client.cancel(job)["status"] == "cancelled"
        assert third.sql("PRAGMA integrity_check") == [("ok",)]


# -- whole jobs --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def openai() -> Iterator[FakeOpenAI]:
    server = FakeOpenAI()
    yield server
    server.close()


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sample_text: Callable[[int, int], str], openai: FakeOpenAI
) -> dict[str, str]:
    texts = tmp_path_factory.mktemp("texts")
    (texts / "text.txt").write_text(sample_text(20_000, 0))
    scripted = {"kind": "openai", "base_url": openai.base_url, "api_key": KEY, "model": "fake", "price_prompt": 1.0}
    return {
        "SELFPRUNER_MODEL_ROOT": str(tiny_llama.parent),
        "SELFPRUNER_TEXT_ROOT": str(texts),
        "SELFPRUNER_PROPOSERS": json.dumps({"scripted": scripted}),
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("service") / "home", **environment) as server:
        yield server
        assert server.end() == 0


@pytest.fixture(scope="module")
def search(tiny_llama: Path) -> dict[str, Any]:
    """A search of seconds on the tiny model, long enough to be killed in the middle."""
    text = {"sources": [{"source": "text.txt"}], "length": 32}
    return {
        "model": tiny_llama.name,
        "rate": 0.3,
        "dtype": "float32",
        "preset": "evolution",
        "seed": 7,
        "calibration": {**text, "sequences": 8},
        "fitness_text": {**text, "sequences": 64},
        "report_text": {**text, "sequences": 4},
        "probe_tokens": 64,
        "final_tokens": 128,
        "generations": 12,
        "patience": 0,
        "population": 4,
        "crossover_offspring": 2,
        "mutation_offspring": 2,
        "stages": [{"tokens": 64, "keep": 4}],
    }


def finish(server: Service, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = {}
    for name, data in server.client.follow(job_id):
        if name == "job":
            job = data
    assert job["status"] == "succeeded", (job["error"], server.log[-3000:])
    return job


def found(server: Service, job_id: str) -> tuple[list[Any], list[float | None]]:
    """Everything a search decided (plans, origin, survival), and the fitness that it was decided by."""
    rows = server.sql(
        "SELECT plan_hash, generation, operator, parents, status, survived, fitness FROM candidate WHERE job_id = ?"
        " ORDER BY sequence",
        job_id,
    )
    return [row[:-1] for row in rows], [row[-1] for row in rows]


def assert_same_search(one: tuple[list[Any], list[float | None]], other: tuple[list[Any], list[float | None]]) -> None:
    assert one[0] == other[0]
    assert one[1] == pytest.approx(other[1], rel=1e-5)


@pytest.fixture(scope="module")
def undisturbed(running: Service, search: dict[str, Any]) -> dict[str, Any]:
    return finish(running, running.client.submit(search)["id"])


def test_a_whole_job(running: Service, undisturbed: dict[str, Any]) -> None:
    job_id, report = undisturbed["id"], undisturbed["result"]
    (checkpoint,) = running.client.checkpoints(job_id)
    assert checkpoint["plan_hash"] == report["best_plan"]
    assert checkpoint["parameters"] == report["best"]["parameters"] < report["dense"]["parameters"]
    assert report["uniform"]["kl"] > 0
    body = manifest.check(Path(checkpoint["path"]))
    assert body["parameters"] == checkpoint["parameters"]
    best = next(iter(running.client.candidates(job_id, "fitness")))
    assert (best["status"], best["id"]) == ("evaluated", report["best_plan"])
    assert running.sql("SELECT count(*) FROM evaluation WHERE job_id = ?", job_id)[0][0] >= report["evaluations"] > 0
    assert report["operators"]["uniform"]["made"] == 1
    assert undisturbed["progress"]["generations"] == 12


def test_a_whole_job_with_an_openai_compatible_proposer(running: Service, search: dict[str, Any], openai: FakeOpenAI) -> None:
    openai.script("good", "prose", "fenced")
    llm = {
        **search,
        "preset": "default",
        "proposer": "scripted",
        "generations": 2,
        "initial": ["uniform", "initialize"],
        "operators": ["select", "crossover", "mutate"],
    }
    job = finish(running, running.client.submit(llm)["id"])
    calls = running.sql("SELECT outcome, proposer, prompt_tokens, cost FROM llm_call WHERE job_id = ?", job["id"])
    assert len(calls) == len(openai.requests)
    assert {proposer for _, proposer, *_ in calls} == {"scripted"}
    assert "ok" in {outcome for outcome, *_ in calls}
    assert sum(cost for *_, cost in calls) == pytest.approx(sum(tokens for *_, tokens, _ in calls) / 1e6)
    assert {"initialize", "crossover", "mutate"} & set(job["result"]["operators"])
    assert openai.keys[0] == f"Bearer {KEY}"
    # The key is in the operator's environment and on the wire to the proposer, and nowhere else.
    assert KEY not in running.log
    for file in running.home.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    process = psutil.Process(running.process.pid)
    assert process.memory_info().rss < RSS_LIMIT
    assert not [m.path for m in process.memory_maps() if "libtorch" in m.path]


def test_a_whole_job_with_the_local_model_as_proposer(running: Service, search: dict[str, Any]) -> None:
    local = {**search, "preset": "default", "generations": 1, "initial": ["uniform", "initialize"], "operators": ["mutate"]}
    job = finish(running, running.client.submit(local)["id"])
    outcomes = [outcome for (outcome,) in running.sql("SELECT outcome FROM llm_call WHERE job_id = ?", job["id"])]
    assert outcomes
    assert set(outcomes) <= {"ok", "no_new_plan"}  # constrained decoding: always valid


def test_errors_of_the_search_reach_the_client(running: Service, search: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        running.client.submit({**search, "model": "missing"})
    with pytest.raises(ConfigError):
        running.client.submit({**search, "proposer": "elsewhere"})
    impossible = running.client.submit({**search, "rate": 0.999})["id"]
    *_, (_, job) = running.client.follow(impossible)
    assert (job["status"], job["error"]["code"]) == ("failed", "budget_unreachable")


def test_a_weight_that_is_no_number_reaches_the_client(running: Service, search: dict[str, Any], tiny_llama: Path) -> None:
    damaged = tiny_llama.parent / "damaged"
    shutil.copytree(tiny_llama, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    *_, (_, job) = running.client.follow(running.client.submit({**search, "model": damaged.name})["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "calibration_unusable")
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in job["error"]["message"]


def at_generation(server: Service, job_id: str, number: int) -> None:
    """Return as soon as this generation is done: the search is in the middle of the next one."""
    for name, data in server.client.follow(job_id):
        if name == "search.generation" and data["data"]["generation"] == number:
            return
    pytest.fail(f"{job_id} ended before generation {number}")


def test_worker_killed_then_server_killed_then_paused_changes_nothing(
    tmp_path: Path, environment: dict[str, str], search: dict[str, Any], running: Service, undisturbed: dict[str, Any]
) -> None:
    home = tmp_path / "home"
    # The same statistics: computed again they may differ in the last bit, which could decide between two equal plans.
    shutil.copytree(running.home / "cache", home / "cache")
    with service(home, **environment) as first:
        job_id = first.client.submit(search)["id"]
        at_generation(first, job_id, 2)
        (killed,) = first.workers()
        killed.kill()
        at_generation(first, job_id, 5)
        (worker,) = first.workers()
        assert worker.pid != killed.pid
        first.end(signal.SIGKILL)
        scored = first.sql("SELECT plan_hash, window, created_at, kl FROM evaluation ORDER BY rowid")
        assert len(scored) > 10
        assert first.sql("SELECT status FROM job") == [("running",)]
    # A worker whose parent died ends by itself.
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "end of the orphan", 20)
    with service(home, **environment) as second:
        at_generation(second, job_id, 8)
        assert second.client.pause(job_id)["status"] == "paused"
        assert second.client.resume(job_id)["status"] in ("queued", "running")
        job = finish(second, job_id)
        rows = second.sql("SELECT plan_hash, window, created_at, kl FROM evaluation ORDER BY rowid")
        assert rows[: len(scored)] == scored  # nothing lost, nothing evaluated again
        assert_same_search(found(second, job_id), found(running, undisturbed["id"]))
        assert job["result"]["best_plan"] == undisturbed["result"]["best_plan"]
        events = [event["type"] for event in second.client.events(job_id)]
        assert events.count("search.probed") == 1
        assert events.count("job.succeeded") == 1
        assert second.end() == 0


def test_cancel_in_mid_search_ends_within_seconds(running: Service, search: dict[str, Any]) -> None:
    job_id = running.client.submit({**search, "generations": 200})["id"]
    at_generation(running, job_id, 1)
    begun = time.monotonic()
    assert running.client.cancel(job_id)["status"] == "cancelled"
    assert time.monotonic() - begun < 8  # five on an idle machine
    assert not (running.home / "checkpoints" / job_id).exists()
