"""The HTTP API around a scripted search: shapes, statuses, states, streams, owners."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event as sqlalchemy_event

from selfpruner.client import Client, parse_stream
from selfpruner.errors import BudgetError, ConfigError, ConflictError, CorruptCheckpointError, NotFoundError, SelfprunerError
from selfpruner.files import manifest
from server.settings import ServerSettings
from tests.helpers.serving import BRIEF, BUDGET, CRASHES, DISK, QUICK, STUBBORN, WAITS, Running, error_of, running_server, until

JOB_FIELDS = {
    "id", "object", "created_at", "started_at", "finished_at", "status", "error", "model", "seed", "metadata", "progress", "config",
    "result",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_server(ServerSettings(home=tmp_path_factory.mktemp("home"), parallel_jobs=4)) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


# -- a job's life ------------------------------------------------------------------------------------------------------
def test_submit_and_retrieve(http: httpx.Client, client: Client) -> None:
    metadata = {"note": "\N{PILE OF POO} \N{RIGHT-TO-LEFT OVERRIDE}שלום", "k" * 64: "v" * 512}
    reply = http.post("/v1/jobs", json={"rate": 0.2, "seed": QUICK, "metadata": metadata}, headers={"x-request-id": "mine-1"})
    assert reply.status_code == 201
    assert reply.headers["x-request-id"] == "mine-1"
    job = reply.json()
    assert set(job) == JOB_FIELDS
    assert reply.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["object"], job["status"], job["model"], job["metadata"]) == ("job", "queued", "smollm2-135m", metadata)
    assert abs(job["created_at"] - time.time()) < 60

    done = until(client, job["id"], "succeeded")
    assert done["created_at"] <= done["started_at"] <= done["finished_at"]
    assert done["error"] is None
    assert done["result"]["best_plan"] == f"{2:016x}"
    assert done["progress"]["evaluations"] == 3
    assert done["config"]["criterion"] == "obs"

    (checkpoint,) = client.checkpoints(job["id"])
    assert checkpoint["parameters"] == 1000
    assert http.get(f"/v1/jobs/{job['id']}/checkpoints/{checkpoint['id']}").json() == checkpoint
    error_of(http.get(f"/v1/jobs/{job['id']}/checkpoints/ckpt_none"), 404)
    other = client.submit({"rate": 0.2})["id"]
    error_of(http.get(f"/v1/jobs/{other}/checkpoints/{checkpoint['id']}"), 404)


def test_checkpoint_files_are_served_while_they_match(server: Running, http: httpx.Client, client: Client, tmp_path: Path) -> None:
    job_id = client.submit({"rate": 0.2})["id"]
    until(client, job_id, "succeeded")
    (checkpoint,) = client.checkpoints(job_id)
    base = f"/v1/jobs/{job_id}/checkpoints/{checkpoint['id']}/files"
    files = http.get(base).json()["data"]
    assert [file["id"] for file in files] == ["model.safetensors", "proof/reference.safetensors", "manifest.json"]
    reply = http.get(f"{base}/model.safetensors", headers={"range": "bytes=0-6"})
    assert (reply.status_code, reply.content) == (206, b"weights")
    for name in ("../../../selfpruner.db", "%2e%2e/%2e%2e/selfpruner.db", "none", "/etc/passwd", "."):
        reply = http.get(f"{base}/{name}")
        assert reply.status_code in (404, 200)
        assert reply.status_code == 404 or reply.json()["object"] == "list"  # the client resolved the dots

    fetched = client.download(job_id, checkpoint["id"], tmp_path / "copy")
    assert sorted(path.name for path in fetched.iterdir()) == ["manifest.json", "model.safetensors", "proof"]
    manifest.check(fetched)

    shard = server.settings.checkpoints / job_id / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert error_of(http.get(f"{base}/model.safetensors"), 500)["code"] == "corrupt"
    with pytest.raises(CorruptCheckpointError):
        client.download(job_id, checkpoint["id"], tmp_path / "second")
    assert not (tmp_path / "second" / "manifest.json").exists()
    shard.unlink()
    assert error_of(http.get(f"{base}/model.safetensors"), 500)["code"] == "corrupt"


def test_what_another_version_stored_is_sent_as_it_is(server: Running, client: Client) -> None:
    job_id = client.submit({"rate": 0.2})["id"]
    until(client, job_id, "succeeded")
    stored: dict[str, Any] = {"best": {"kl": "not measured", "size": [1, None]}, "operators": [], "figures_of_then": {"a": 0.5}}
    server.store.set_result(job_id, stored)
    assert client.get(job_id)["result"] == stored
    assert client.list(limit=1)["data"][0]["result"] == stored


def test_list_pages_newest_first(http: httpx.Client, client: Client) -> None:
    ids = [client.submit({"rate": 0.2})["id"] for _ in range(3)][::-1]
    first = http.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == ids[:2]
    assert (first["object"], first["has_more"], first["first_id"], first["last_id"]) == ("list", True, ids[0], ids[1])
    assert client.list(after=first["last_id"], limit=1)["data"][0]["id"] == ids[2]
    until(client, ids[0], "succeeded")
    assert all(job["status"] == "succeeded" for job in client.list(status="succeeded")["data"])


def test_candidates_by_generation_and_by_fitness(http: httpx.Client, client: Client) -> None:
    job_id = client.submit({"rate": 0.2})["id"]
    until(client, job_id, "succeeded")
    assert [row["generation"] for row in client.candidates(job_id)] == [0, 1, 2]
    best = list(client.candidates(job_id, "fitness"))
    assert (best[0]["predicted"], best[0]["credit"], best[0]["informed_by"]) == (0.75, None, None)
    assert [row["id"] for row in best] == [f"{n:016x}" for n in (2, 1, 0)]
    assert best[0]["rates"] == [0.1, 0.3]
    page = http.get(f"/v1/jobs/{job_id}/candidates", params={"limit": 1, "after": best[2]["id"]}).json()
    assert page["data"][0]["id"] == best[1]["id"]
    assert client.candidate(job_id, best[1]["id"]) == best[1] == client.candidate(job_id, f"{1:016x}"[:16])
    assert error_of(http.get(f"/v1/jobs/{job_id}/candidates/0000"), 422)["code"] == "ambiguous_name"
    assert error_of(http.get(f"/v1/jobs/{job_id}/candidates/f"), 404)["code"] == "not_found"


@pytest.mark.parametrize(
    ("seed", "code", "param"),
    [(BUDGET, "budget_unreachable", "rate"), (DISK, "disk_full", None), (CRASHES, "internal_error", None)],
)
def test_a_failed_job_says_why(client: Client, seed: int, code: str, param: str | None, caplog: pytest.LogCaptureFixture) -> None:
    job = until(client, client.submit({"rate": 0.2, "seed": seed})["id"], "failed")
    assert (job["error"]["code"], job["error"]["param"]) == (code, param)
    assert job["result"] is None
    if code == "internal_error":
        assert "an internal detail" not in job["error"]["message"]
        reference = re.search(r"err_\w+", job["error"]["message"])
        assert reference is not None
        assert reference.group() in caplog.text
        assert "an internal detail" in caplog.text


def test_cancel_a_running_job(server: Running, client: Client, http: httpx.Client) -> None:
    job_id = client.submit({"rate": 0.2, "seed": WAITS})["id"]
    until(client, job_id, "running")
    job = client.cancel(job_id)
    assert (job["status"], job["error"]) == ("cancelled", None)
    assert job["finished_at"]
    assert not (server.settings.checkpoints / job_id).exists()
    for action in ("cancel", "pause", "resume"):
        assert error_of(http.post(f"/v1/jobs/{job_id}/{action}"), 409)["code"].startswith("job_")


def test_cancel_of_a_search_that_is_slow_to_stop(client: Client) -> None:
    job_id = client.submit({"rate": 0.2, "seed": STUBBORN})["id"]
    until(client, job_id, "running")
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: client.cancel(job_id), range(2))
    assert first["status"] == second["status"] == "cancelled"


def test_pause_and_resume(server: Running, client: Client, http: httpx.Client) -> None:
    job_id = client.submit({"rate": 0.2, "seed": WAITS})["id"]
    until(client, job_id, "running")
    assert client.pause(job_id)["status"] == "paused"
    error_of(http.post(f"/v1/jobs/{job_id}/pause"), 409)
    assert client.resume(job_id)["status"] in ("queued", "running")
    until(client, job_id, "running")
    assert server.searches.count(job_id) == 2
    assert len(list(client.candidates(job_id))) == 3
    client.pause(job_id)
    assert client.cancel(job_id)["status"] == "cancelled"


def test_jobs_queue_and_a_queued_one_is_cancelled(tmp_path: Path) -> None:
    with running_server(ServerSettings(home=tmp_path)) as running, Client(running.url) as client:
        first, second, third = (client.submit({"rate": 0.2, "seed": seed})["id"] for seed in (WAITS, WAITS, QUICK))
        until(client, first, "running")
        assert client.get(second)["status"] == "queued"
        with pytest.raises(ConflictError):
            client.pause(second)
        assert client.cancel(second)["status"] == "cancelled"
        client.cancel(first)
        until(client, third, "succeeded")
        assert running.searches == [first, third]


def test_cancel_races_end_in_one_terminal_state(server: Running, client: Client) -> None:
    def race(number: int) -> str:
        job_id: str = client.submit({"rate": 0.2, "seed": BRIEF})["id"]
        time.sleep((number % 8) * 0.004)
        with suppress(ConflictError):
            client.cancel(job_id)
        return job_id

    with ThreadPoolExecutor(4) as threads:
        jobs = list(threads.map(race, range(24)))
    ends = Counter(until(client, job_id, "succeeded", "cancelled")["status"] for job_id in jobs)
    assert set(ends) <= {"succeeded", "cancelled"}
    for job_id in jobs:
        terminal = [e for e in client.events(job_id) if e["type"] in ("job.succeeded", "job.cancelled", "job.failed")]
        assert len(terminal) == 1
        exists = (server.settings.checkpoints / job_id).exists()
        assert exists == (client.get(job_id)["status"] == "succeeded")


def test_stop_hands_running_jobs_back_and_start_takes_them_up(tmp_path: Path) -> None:
    settings = ServerSettings(home=tmp_path)
    with running_server(settings) as running, Client(running.url) as client:
        job_id = client.submit({"rate": 0.2, "seed": WAITS})["id"]
        waiting = client.submit({"rate": 0.2, "seed": QUICK})["id"]
        until(client, job_id, "running")
    with sqlite3.connect(f"file:{settings.database}?mode=ro", uri=True) as database:
        found = database.execute("SELECT id, status FROM job ORDER BY number").fetchall()
    database.close()
    assert found == [(job_id, "queued"), (waiting, "queued")]
    with running_server(settings) as running, Client(running.url) as client:
        until(client, job_id, "running")
        client.cancel(job_id)
        until(client, waiting, "succeeded")


def test_disk_full_is_an_answer_and_the_server_goes_on(tmp_path: Path) -> None:
    """A real SQLITE_FULL: the database may not grow any more."""
    with running_server(ServerSettings(home=tmp_path)) as running, Client(running.url) as client:
        job_id = client.submit({"rate": 0.2, "seed": WAITS})["id"]
        until(client, job_id, "running")
        pages = [2]

        def limit(connection: sqlite3.Connection, _record: object, _proxy: object) -> None:
            connection.execute(f"PRAGMA max_page_count = {pages[0]}")

        engine = running.store._database._engine
        sqlalchemy_event.listen(engine, "checkout", limit)
        full = None
        with httpx.Client(base_url=running.url, trust_env=False) as http:
            for _ in range(200):
                reply = http.post("/v1/jobs", json={"rate": 0.2, "metadata": {"a": "b" * 512}})
                if reply.status_code != 201:
                    full = error_of(reply, 507)
                    break
            assert full is not None
            assert full["code"] == "disk_full"
            assert http.get("/healthz").json()["running_jobs"] == 1
            assert http.get("/v1/jobs").status_code == 200
            pages[0] = 1_000_000
            assert http.post("/v1/jobs", json={"rate": 0.2}).status_code == 201
        client.cancel(job_id)


# -- events ------------------------------------------------------------------------------------------------------------
def read_stream(http: httpx.Client, job_id: str, after: str | None = None) -> list[Any]:
    headers = {"accept": "text/event-stream", **({"last-event-id": after} if after else {})}
    reply = http.get(f"/v1/jobs/{job_id}/events", headers=headers)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    return list(parse_stream(iter(reply.text.split("\n"))))


def test_event_pages_and_stream_agree(http: httpx.Client, client: Client) -> None:
    job_id = client.submit({"rate": 0.2})["id"]
    until(client, job_id, "succeeded")
    events = list(client.events(job_id))
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert set(events[0]) == {"id", "object", "created_at", "level", "type", "message", "data"}
    assert events[-1]["type"] == "job.succeeded"
    page = http.get(f"/v1/jobs/{job_id}/events", params={"after": 1, "limit": 2}).json()
    assert page["data"] == events[1:3]
    assert page["has_more"]

    messages = read_stream(http, job_id)
    assert [m.id for m in messages if m.id] == [str(event["id"]) for event in events]
    assert messages[-1].event == "job"
    assert [m.id for m in read_stream(http, job_id, "2") if m.id] == [str(event["id"]) for event in events[2:]]
    end = {"accept": "text/event-stream", "last-event-id": str(len(events))}
    assert http.get(f"/v1/jobs/{job_id}/events", headers=end).status_code == 204
    bad = http.get(f"/v1/jobs/{job_id}/events", headers={"accept": "text/event-stream", "last-event-id": "x"})
    assert error_of(bad, 422)["param"] == "last-event-id"


def test_follow_survives_dropped_connections(server: Running) -> None:
    """Every event once, in order, though every connection breaks after a few chunks, in the middle of a line too."""

    class Torn(httpx.SyncByteStream):
        def __init__(self, inner: httpx.SyncByteStream) -> None:
            self.inner = inner

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for chunk in self.inner:
                size += len(chunk)
                yield chunk[: max(1, len(chunk) - 20)] if size > 3000 else chunk
                if size > 3000:
                    raise httpx.ReadError("connection reset")

        def close(self) -> None:
            self.inner.close()

    class Tearing(httpx.HTTPTransport):
        opened = 0

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            reply = super().handle_request(request)
            if "text/event-stream" in request.headers["accept"]:
                Tearing.opened += 1
                assert isinstance(reply.stream, httpx.SyncByteStream)
                reply.stream = Torn(reply.stream)
            return reply

    with Client(server.url) as steady, Client(server.url, transport=Tearing(), sleep=lambda _: None) as client:
        job_id = steady.submit({"rate": 0.2, "seed": WAITS})["id"]
        until(steady, job_id, "running")
        canceller = threading.Timer(0.3, steady.cancel, [job_id])
        canceller.start()
        seen = [data for name, data in client.follow(job_id) if name != "job"]
        canceller.join()
        assert seen == list(steady.events(job_id))
        assert Tearing.opened > 1
        assert "\N{LINE SEPARATOR}" in "".join(event["message"] for event in seen)


def test_follow_goes_on_through_a_restart(tmp_path: Path) -> None:
    settings, seen = ServerSettings(home=tmp_path), []
    with running_server(settings) as first:
        client = Client(first.url, sleep=lambda _: time.sleep(0.05))
        job_id = client.submit({"rate": 0.2, "seed": WAITS})["id"]
        until(client, job_id, "running")
        follower = threading.Thread(target=lambda: seen.extend(client.follow(job_id)))
        follower.start()
    with running_server(settings, int(first.url.rsplit(":", 1)[1])) as second, Client(second.url) as other:
        until(other, job_id, "running")
        other.cancel(job_id)
        follower.join(timeout=20)
        assert [data for name, data in seen if name != "job"] == list(other.events(job_id))
        assert [name for name, _ in seen].count("job.running") == 2
    client.close()


def test_live_stream_brings_progress_and_ends_with_the_job(server: Running, client: Client) -> None:
    job_id = client.submit({"rate": 0.2, "seed": WAITS})["id"]
    with Client(server.url) as follower:
        names: list[str] = []
        for name, data in follower.follow(job_id):
            names.append(name)
            if name == "job" and data["status"] == "running" and data["progress"]["evaluations"] == 3:
                client.cancel(job_id)
        assert names[-1] == "job"
        assert "job.cancelled" in names


# -- repeated requests -------------------------------------------------------------------------------------------------
def test_idempotency_key(http: httpx.Client) -> None:
    key = {"idempotency-key": "k1"}
    refused = http.post("/v1/jobs", json={"rate": 2}, headers=key)
    error_of(refused, 422)  # and not stored
    first = http.post("/v1/jobs", json={"rate": 0.2}, headers=key)
    again = http.post("/v1/jobs", json={"rate": 0.2, "seed": 0}, headers=key)
    assert first.status_code == again.status_code == 201
    assert first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    conflict = error_of(http.post("/v1/jobs", json={"rate": 0.3}, headers=key), 409)
    assert conflict["code"] == "idempotency_conflict"
    error_of(http.post("/v1/jobs", json={"rate": 0.2}, headers={"idempotency-key": "k" * 256}), 422)


def test_concurrent_requests_with_one_key_are_one_job(client: Client) -> None:
    with ThreadPoolExecutor(8) as threads:
        jobs = list(threads.map(lambda _: client.submit({"rate": 0.2}, idempotency_key="race"), range(16)))
    assert len({job["id"] for job in jobs}) == 1


# -- owners ------------------------------------------------------------------------------------------------------------
def test_tokens_and_owners(tmp_path: Path) -> None:
    settings = ServerSettings(home=tmp_path, token="token-of-default", tokens={"ann": "token-of-ann"})
    with running_server(settings) as running:
        with httpx.Client(base_url=running.url, trust_env=False) as http:
            assert http.get("/healthz").status_code == 200
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic eDp5"}, {"authorization": "Bearer"}):
                reply = http.get("/v1/jobs", headers=headers)
                assert error_of(reply, 401)["code"] == "invalid_token"
                assert reply.headers["www-authenticate"] == "Bearer"
            error_of(http.post("/v1/jobs", json={"rate": 0.2}), 401)
        with Client(running.url, "token-of-ann") as ann, Client(running.url, "token-of-default") as other:
            job_id = ann.submit({"rate": 0.2, "seed": WAITS}, idempotency_key="same")["id"]
            assert other.submit({"rate": 0.3}, idempotency_key="same")["id"] != job_id
            assert job_id not in [job["id"] for job in other.list()["data"]]
            for action in (other.get, other.cancel, other.pause, other.resume):
                with pytest.raises(NotFoundError):
                    action(job_id)
            for listing in (other.events, other.candidates, other.checkpoints):
                with pytest.raises(NotFoundError):
                    list(listing(job_id))
            with pytest.raises(SelfprunerError):
                other.list(after=job_id)
            ann.cancel(job_id)


def test_client_raises_the_servers_errors(client: Client) -> None:
    with pytest.raises(ConfigError) as caught:
        client.submit({"rate": 0.2, "criterion": "flop"})
    assert (caught.value.code, caught.value.param) == ("unknown_name", "criterion")
    assert "Did you mean 'flap'?" in caught.value.message
    with pytest.raises(SelfprunerError) as caught:
        client.submit({"rate": 0.2, "nonsense": 1})
    assert (caught.value.code, caught.value.type) == ("unknown_field", "invalid_request_error")
    job = until(client, client.submit({"rate": 0.2, "seed": BUDGET})["id"], "failed")
    assert job["error"]["code"] == BudgetError.code
    with Client("http://127.0.0.1:9", retries=1, sleep=lambda _: None) as nobody, pytest.raises(SelfprunerError) as caught:
        nobody.list()
    assert caught.value.code == "server_unreachable"
    assert "selfpruner serve" in caught.value.message
