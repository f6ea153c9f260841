"""A server for tests: the real application and a real socket around a scripted search, in a thread of the test process.

What a job does is decided by its ``seed``, see ``SCRIPT``; everything around it (store, runner, HTTP) is the product's.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from selfpruner.client import Client
from selfpruner.config import SearchConfig
from selfpruner.errors import (
    BudgetError,
    DiskFullError,
)
from selfpruner.files import manifest
from selfpruner.jobs.lifecycle import JobResult
from selfpruner.records import Candidate, Evaluation, Progress, Recorder
from selfpruner.store.store import Store
from server.app import create_app
from server.settings import ServerSettings

QUICK, WAITS, BUDGET, CRASHES, DISK, STUBBORN, BRIEF, WAITS_ONCE = range(8)


def record(recorder: Recorder, plans: int = 3) -> None:
    for number in range(plans):
        identity = f"{number:016x}"
        recorder.save_evaluations([Evaluation(identity, "fit-0", 64, 1.0 / (number + 1), 2.0, 0.01)])
        recorder.save_candidates(
            [
                Candidate(
                    identity,
                    (number, 0),
                    (0.1, 0.3),
                    number,
                    "uniform",
                    status="evaluated",
                    fitness=1.0 / (number + 1),
                    relative=1.0,
                    predicted=0.75,
                )
            ]
        )
        recorder.event(f"plan-{number}", "candidate.evaluated", f"plan {number}\N{LINE SEPARATOR}and more", data={"plan": identity})
        operators = {"operators": {"uniform": number + 1}, "improved": {"uniform": number}}
        recorder.progress(Progress("searching", number, plans, number + 1, number + 1, 1.0 / (number + 1), 1.0, data=operators))


async def quick(recorder: Recorder, folder: Path, plans: int = 3) -> JobResult:
    record(recorder, plans)
    await asyncio.sleep(0)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "proof").mkdir()
    (folder / "proof" / "reference.safetensors").write_bytes(b"logits")
    digest = manifest.write(folder, plan={}, parameters=1000, verification={})
    checkpoint = {
        "path": str(folder),
        "plan_hash": f"{2:016x}",
        "parameters": 1000,
        "bytes": 7000,
        "manifest_sha256": digest,
        "verification": {"max_difference": 0.0},
        "metrics": {"kl": 0.1},
    }
    return JobResult({"best_plan": f"{2:016x}"}, checkpoint)


async def waits(recorder: Recorder, folder: Path) -> JobResult:
    record(recorder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "half-a-shard").write_text("x")
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def waits_once(recorder: Recorder, folder: Path) -> JobResult:
    """As a search that is run again does: what was recorded is not repeated."""
    if recorder.find_event("plan-2") is None:
        return await waits(recorder, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return await quick(recorder, folder)


async def beyond_budget(recorder: Recorder, folder: Path) -> JobResult:  # noqa: ARG001
    raise BudgetError("No plan removes that much. Lower the rate.", param="rate")


async def crashes(recorder: Recorder, folder: Path) -> JobResult:  # noqa: ARG001
    raise RuntimeError("an internal detail")


async def fills_the_disk(recorder: Recorder, folder: Path) -> JobResult:  # noqa: ARG001
    raise DiskFullError("No space left. Free some.")


async def stubborn(recorder: Recorder, folder: Path) -> JobResult:  # noqa: ARG001
    """Does not stop when it is asked to, for longer than the runner waits."""
    while True:
        try:
            await asyncio.sleep(30)
            raise AssertionError("not cancelled")
        except asyncio.CancelledError:
            await asyncio.sleep(0.6)
            raise


async def brief(recorder: Recorder, folder: Path) -> JobResult:
    await asyncio.sleep(0.01)
    return await quick(recorder, folder, plans=0)


SCRIPT: dict[int, Callable[[Recorder, Path], Awaitable[JobResult]]] = {
    QUICK: quick,
    WAITS: waits,
    BUDGET: beyond_budget,
    CRASHES: crashes,
    DISK: fills_the_disk,
    STUBBORN: stubborn,
    BRIEF: brief,
    WAITS_ONCE: waits_once,
}


class NoPool:
    """The scripted search needs no workers."""

    async def run(self, *_: object, **__: object) -> dict[str, Any]:
        raise AssertionError("no task was expected")

    async def close(self) -> None: ...


@dataclass
class Running:
    url: str
    store: Store
    settings: ServerSettings
    searches: list[str] = field(default_factory=list)


@contextmanager
def running_server(settings: ServerSettings, port: int = 0) -> Iterator[Running]:
    for folder in (settings.home, settings.cache, settings.checkpoints, settings.logs):
        folder.mkdir(parents=True, exist_ok=True)
    with Store(settings.database) as store, socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        here = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", store, settings)

        async def run_job(config: SearchConfig, *, job_id: str, recorder: Recorder, checkpoint_dir: Path, **_: object) -> JobResult:
            here.searches.append(job_id)
            return await SCRIPT.get(config.seed, quick)(recorder, checkpoint_dir)

        app = create_app(settings, store, run_job=run_job, pool_factory=lambda _settings: NoPool())
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield here
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


def until(client: Client, job_id: str, *statuses: str, seconds: float = 10) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (job := client.get(job_id))["status"] not in statuses:
        assert time.monotonic() < end, f"{job_id} is {job['status']}, not {statuses}"
        time.sleep(0.01)
    return job


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a reply, after a look at its shape."""
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert body["error"]["message"]
    assert "Traceback" not in reply.text
    error: dict[str, Any] = body["error"]
    return error
