"""Checkpoints over real HTTP: ranges and conditions as RFC 9110 has them, archives, and downloads that break and go on."""

from __future__ import annotations

import io
import json
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from transformers.models.auto import AutoTokenizer

from selfpruner.cli import app as cli
from selfpruner.client import Client, UnreachableError
from selfpruner.errors import ConfigError, CorruptCheckpointError
from selfpruner.export import proof
from selfpruner.export.checkpoint import write
from selfpruner.files import manifest
from selfpruner.records import CheckpointFacts
from selfpruner.testing.cut_models import CARD, folder, prune, units_of
from server.settings import ServerSettings
from tests.helpers.serving import Running, error_of, running_server, until

WEIGHTS = b"weights" * 1000


@dataclass(frozen=True)
class Job:
    server: Running
    id: str
    checkpoint: str

    @property
    def base(self) -> str:
        return f"/v1/jobs/{self.id}/checkpoints/{self.checkpoint}"

    @property
    def folder(self) -> Path:
        return self.server.settings.checkpoints / self.id


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with running_server(ServerSettings(home=tmp_path / "home")) as server, Client(server.url) as client:
        done = until(client, client.submit({"rate": 0.2})["id"], "succeeded")
        (checkpoint,) = client.checkpoints(done["id"])
        yield Job(server, done["id"], checkpoint["id"])


@pytest.fixture
def http(job: Job) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=job.server.url, trust_env=False) as client:
        yield client


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [
        ("bytes=0-6", 206, 0, 6),
        ("bytes=6993-", 206, 6993, 6999),
        ("bytes=-7", 206, 6993, 6999),
        ("bytes=-99999", 206, 0, 6999),
        ("bytes=10-99999999", 206, 10, 6999),
        ("Bytes= 5-5", 206, 5, 5),
        ("bytes=7000-", 416, 0, 0),
        ("bytes=99999999999-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        # What a server may ignore, and must where it does not know the unit.
        ("bytes=6-5", 200, 0, 6999),
        ("bytes=0-1,4-5", 200, 0, 6999),
        ("bytes=-", 200, 0, 6999),
        ("bytes=a-b", 200, 0, 6999),
        ("lines=0-5", 200, 0, 6999),
        ("bytes=1-" + "9" * 400, 200, 0, 6999),
    ],
)
def test_ranges(job: Job, http: httpx.Client, asked: str, status: int, first: int, last: int) -> None:
    reply = http.get(f"{job.base}/files/model.safetensors", headers={"range": asked})
    assert reply.status_code == status, reply.text
    if status == 416:
        assert error_of(reply, 416)["code"] == "range_not_satisfiable"
        assert reply.headers["content-range"] == "bytes */7000"
        return
    assert reply.content == WEIGHTS[first : last + 1]
    assert reply.headers["content-length"] == str(last + 1 - first)
    assert reply.headers["accept-ranges"] == "bytes"
    assert reply.headers.get("content-range") == (f"bytes {first}-{last}/7000" if status == 206 else None)


def test_conditions(job: Job, http: httpx.Client) -> None:
    place = f"{job.base}/files/model.safetensors"
    tag = http.get(place).headers["etag"]
    assert tag == f'"{manifest.sha256(job.folder / "model.safetensors")}"'
    for header in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        reply = http.get(place, headers={"if-none-match": header, "range": "bytes=0-1"})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", tag)
    assert http.get(place, headers={"if-none-match": '"other"'}).status_code == 200
    for header, status in ((tag, 206), ('"other"', 200), (f"W/{tag}", 200), ("Mon, 23 Nov 2026 09:00:00 GMT", 200)):
        assert http.get(place, headers={"range": "bytes=5-9", "if-range": header}).status_code == status
    assert http.get(place, headers={"range": "bytes=7000-", "if-range": '"other"'}).status_code == 200
    head = http.head(place, headers={"range": "bytes=5-9"})
    assert (head.status_code, head.content, head.headers["content-length"], head.headers["etag"]) == (200, b"", "7000", tag)


def test_an_archive_is_the_folder_and_always_the_same(job: Job, http: httpx.Client, tmp_path: Path) -> None:
    place = f"{job.base}/archive"
    reply = http.get(place)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/x-tar"
    assert int(reply.headers["content-length"]) == len(reply.content) == int(http.head(place).headers["content-length"])
    assert reply.headers["etag"] == f'"{manifest.sha256(job.folder / manifest.NAME)}"'
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as archive:
        assert archive.getnames()[-1] == f"{job.checkpoint}/{manifest.NAME}"
        archive.extractall(tmp_path / "out", filter="data")
    unpacked = tmp_path / "out" / job.checkpoint
    assert manifest.check(unpacked) == manifest.check(job.folder)
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*")} == {
        path.relative_to(job.folder) for path in job.folder.rglob("*")
    }
    assert http.get(place).content == reply.content
    for first in range(0, len(reply.content), 1501):  # across the edges of headers, files and paddings
        last = min(first + 1500, len(reply.content) - 1)
        part = http.get(place, headers={"range": f"bytes={first}-{last}"})
        assert (part.status_code, part.content) == (206, reply.content[first : last + 1])

    reference = job.folder / proof.REFERENCE
    reference.write_bytes(b"other!")
    assert error_of(http.get(place), 500)["code"] == "corrupt"
    error_of(http.get(f"{job.base[:-1]}/archive"), 404)


def test_long_names_and_empty_files_survive_an_archive(job: Job, http: httpx.Client) -> None:
    (job.folder / "empty").touch()
    (job.folder / ("long" * 50)).write_text("x")
    (job.folder / manifest.NAME).unlink()
    digest = manifest.write(job.folder, plan={}, parameters=1, verification={})
    facts: CheckpointFacts = {
        "plan_hash": f"{1:016x}",
        "path": str(job.folder),
        "parameters": 1,
        "bytes": 1,
        "manifest_sha256": digest,
        "verification": {},
        "metrics": {},
    }
    row = job.server.store.add_checkpoint(job.id, facts)
    reply = http.get(f"/v1/jobs/{job.id}/checkpoints/{row.id}/archive")
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as archive:
        found = {member.name.partition("/")[2]: member.size for member in archive}
    assert found["empty"] == 0
    assert found["long" * 50] == 1
    assert http.get(f"/v1/jobs/{job.id}/checkpoints/{row.id}/files/empty").content == b""
    assert http.get(f"/v1/jobs/{job.id}/checkpoints/{row.id}/files/empty", headers={"range": "bytes=0-"}).status_code == 416


# -- connections that break --------------------------------------------------------------------------------------------
@dataclass
class Cutting:
    """A proxy on a real socket that resets a connection after so many bytes of replies; ``budgets`` has one per connection, None:
    never. Requests are kept as they came."""

    target: int
    budgets: list[int | None]
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            budget = self.budgets.pop(0) if self.budgets else None
            threading.Thread(target=self._relay, args=(client, budget), daemon=True).start()

    def _relay(self, client: socket.socket, budget: int | None) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            while chunk := server.recv(1024):
                if budget is not None:
                    chunk, budget = chunk[:budget], budget - len(chunk)
                client.sendall(chunk)
                if budget is not None and budget <= 0:
                    client.shutdown(socket.SHUT_RDWR)
                    return

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while chunk := client.recv(65536):
                self.requests.append(chunk.decode())
                server.sendall(chunk)
        except OSError:
            return


@contextmanager
def cutting(url: str, *budgets: int | None) -> Iterator[Cutting]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Cutting(int(url.rsplit(":", 1)[1]), list(budgets))
        proxy.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=proxy.serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(timeout=10)


def test_a_download_goes_on_where_the_connection_broke(job: Job, tmp_path: Path) -> None:
    with cutting(job.server.url, 3000, 2000, 2500) as proxy, Client(proxy.url, sleep=lambda _: None) as client:
        fetched = client.download(job.id, job.checkpoint, tmp_path / "copy")
    manifest.check(fetched)
    ranges = [line for request in proxy.requests for line in request.lower().split("\r\n") if line.startswith("range: ")]
    assert len(ranges) == 3
    starts = [int(line.removeprefix("range: bytes=").rstrip("-")) for line in ranges]
    assert 0 < starts[0] < starts[1] < starts[2] < 7000
    tag = f'if-range: "{manifest.sha256(job.folder / "model.safetensors")}"'
    assert sum(tag in request.lower() for request in proxy.requests) == 3


def test_an_interrupted_download_goes_on_at_the_next_call(job: Job, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    with (
        cutting(job.server.url, 3000, *[0] * 20) as proxy,
        Client(proxy.url, retries=1, sleep=lambda _: None) as client,
        pytest.raises(UnreachableError),
    ):
        client.download(job.id, job.checkpoint, place)
    assert [path.name for path in place.iterdir()] == ["model.safetensors.part"]
    have = (place / "model.safetensors.part").stat().st_size
    assert 0 < have < 7000
    with cutting(job.server.url) as proxy, Client(proxy.url) as client:
        client.download(job.id, job.checkpoint, place)
        assert any(f"range: bytes={have}-" in request.lower() for request in proxy.requests)
        assert not list(place.rglob("*.part"))
        manifest.check(place)
        with pytest.raises(ConfigError, match="not empty"):  # it is complete
            client.download(job.id, job.checkpoint, place)


def test_what_is_there_is_judged(job: Job, tmp_path: Path) -> None:
    with Client(job.server.url) as client:
        for name, body, expected in (
            ("thesis.tex", b"mine", ConfigError),
            ("model.safetensors", b"mine", CorruptCheckpointError),
            ("model.safetensors.part", b"x" * 3500, CorruptCheckpointError),
        ):
            place = tmp_path / name
            place.mkdir()
            (place / name).write_bytes(body)
            with pytest.raises(expected):
                client.download(job.id, job.checkpoint, place)
            assert (place / name).exists() == (not name.endswith(".part"))
            assert not (place / manifest.NAME).exists()
        # The last one was removed, so that the same call fetches the file anew; longer than the file, it is not gone on from.
        client.download(job.id, job.checkpoint, tmp_path / "model.safetensors.part")
        whole = tmp_path / "whole"
        (whole / "proof").mkdir(parents=True)
        (whole / "model.safetensors.part").write_bytes(WEIGHTS)
        (whole / "proof" / "reference.safetensors").write_bytes(b"logits")
        manifest.check(client.download(job.id, job.checkpoint, whole))


# -- exports of a job --------------------------------------------------------------------------------------------------
def test_a_job_on_a_server_is_exported_here_and_from_elsewhere(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proof, "prove", lambda *_: {"problems": []})
    source, model = folder(tmp_path / "base", "llama")
    case = prune(model, drop=False, biased=False)
    made = write(case.pruned, AutoTokenizer.from_pretrained(source), None, tmp_path / "real", CARD, units=units_of(case))
    facts: CheckpointFacts = {
        "plan_hash": "f" * 16,
        "path": str(made.path),
        "parameters": made.parameters,
        "bytes": made.bytes,
        "manifest_sha256": made.manifest_sha256,
        "verification": made.verification,
        "metrics": {},
    }
    job.server.store.add_checkpoint(job.id, facts)
    line = ["export", job.id, "--format", "masked", "--url", job.server.url, "--json", "-o"]
    assert cli.run([*line, str(tmp_path / "here")]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "here")

    listed = Client.checkpoints
    monkeypatch.setattr(Client, "checkpoints", lambda self, job_id: ({**row, "path": "/elsewhere"} for row in listed(self, job_id)))
    assert cli.run([*line, str(tmp_path / "there")]) == 0
    one, two = (manifest.read(tmp_path / name) for name in ("here", "there"))
    assert one["files"] == two["files"]
    assert one["export"] == two["export"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "here", "home", "real", "there"]
