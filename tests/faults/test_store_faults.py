"""The store under faults: power loss, SIGKILL, a full disk, damage, a second writer. Acknowledged means there after restart.

Run as a program (``python -m tests.faults.test_store_faults DATABASE``) this file is the writer that the tests stop and kill: it
plays jobs one after another and prints a line for everything the store has acknowledged.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import pytest
from sqlalchemy import Engine, event

from selfpruner.config import SearchConfig
from selfpruner.errors import DiskFullError, StoreError
from selfpruner.records import Candidate, Evaluation, LlmCall
from selfpruner.store import database
from selfpruner.store.store import Store
from selfpruner.store.tables import TERMINAL, TRANSITIONS
from selfpruner.workers.lifeline import tied
from tests.helpers import ROOT

CONFIG = SearchConfig(rate=0.2)


def write_for_ever(path: str) -> None:
    def acknowledge(*words: object) -> None:
        os.write(1, (" ".join(map(str, words)) + "\n").encode())

    with Store(path) as store:
        store.requeue_running()
        while True:
            job = store.next_queued() or store.create_job(CONFIG)[0]
            acknowledge("job", job.id)
            store.transition(job.id, "running")
            recorder = store.recorder(job.id)
            for number in range(20):
                plan = f"plan{number}"
                recorder.save_candidates([Candidate(plan, (number,), (0.2,), number, "mutate")])
                recorder.save_evaluations([Evaluation(plan, "w0", 64, 0.1, 3.0, 0.1)])
                acknowledge("evaluation", job.id, plan)
                recorder.save_llm_call(LlmCall(number, 0, "mutate", "p", "m", (), "x" * 40_000, "ok", 1, 1, 0.1, 0.0))
                recorder.event(f"generation/{number}", "generation.finished", "done")
                acknowledge("event", job.id, f"generation/{number}")
            store.transition(job.id, "succeeded")
            acknowledge("succeeded", job.id)


@contextmanager
def writer(path: Path, acknowledged: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The writer program, at work; it is dead when the block ends."""
    with acknowledged.open("ab") as log:
        size = log.tell()
        process = subprocess.Popen(
            tied("-m", "tests.faults.test_store_faults", str(path)), stdout=log, stderr=subprocess.PIPE, cwd=ROOT
        )
    try:
        deadline = time.monotonic() + 60
        while acknowledged.stat().st_size == size:
            assert process.poll() is None, errors_of(process.stderr)
            assert time.monotonic() < deadline, "the writer did not start"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def errors_of(stream: IO[bytes] | None) -> str:
    return stream.read().decode() if stream is not None else ""


def check(path: Path, acknowledged: bytes) -> None:
    """The database opens, is sound, holds every acknowledged row, and no job is in a state it cannot be in."""
    with Store(path) as store, closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        statuses = dict(connection.execute("SELECT id, status FROM job").fetchall())
        assert set(statuses.values()) <= set(TRANSITIONS)
        evaluations = set(connection.execute("SELECT job_id, plan_hash FROM evaluation"))
        events = set(connection.execute("SELECT job_id, key FROM event"))
        counts = connection.execute("SELECT job_id, count(*), max(sequence) FROM event GROUP BY job_id").fetchall()
        assert all(count == last for _, count, last in counts)
        ended = dict(connection.execute("SELECT id, finished_at IS NOT NULL FROM job").fetchall())
        assert all(ended[job_id] == (status in TERMINAL) for job_id, status in statuses.items())
        for line in acknowledged.decode().splitlines():
            kind, job_id, *rest = line.split()
            assert job_id in statuses
            if kind == "evaluation":
                assert (job_id, rest[0]) in evaluations
            elif kind == "event":
                assert (job_id, rest[0]) in events
            elif kind == "succeeded":
                assert statuses[job_id] == "succeeded"
        running = [job_id for job_id, status in statuses.items() if status == "running"]
        assert [job.id for job in store.requeue_running()] == running


def whole_lines(log: Path) -> bytes:
    data = log.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def test_power_loss_at_fifty_moments(tmp_path: Path) -> None:
    """A stopped process makes no system call, so the copied pair of files is what the disk had at that moment."""
    path, log = tmp_path / "store.db", tmp_path / "acknowledged"
    rng = random.Random(1)
    copies: list[tuple[Path, bytes]] = []
    with writer(path, log) as process:
        for number in range(50):
            time.sleep(rng.uniform(0.001, 0.06))
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            folder = tmp_path / f"copy{number}"
            folder.mkdir()
            for suffix in ("", "-wal"):
                shutil.copyfile(f"{path}{suffix}", folder / f"store.db{suffix}")
            copies.append((folder / "store.db", whole_lines(log)))
            os.kill(process.pid, signal.SIGCONT)
    assert len({acknowledged for _, acknowledged in copies}) > 25
    for copy, acknowledged in copies:
        check(copy, acknowledged)
        shutil.rmtree(copy.parent)


def test_sigkill_in_mid_write_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path, log = tmp_path / "store.db", tmp_path / "acknowledged"
    rng = random.Random(2)
    for _ in range(4):
        with writer(path, log) as process:
            time.sleep(rng.uniform(0.01, 0.3))
            process.kill()
            process.wait()
        # The log also holds what was acknowledged in earlier lives of the writer.
        check(path, whole_lines(log))


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path, log = tmp_path / "store.db", tmp_path / "acknowledged"
    with writer(path, log) as process:
        with pytest.raises(StoreError, match=f"pid {process.pid}") as error:
            Store(path)
        assert error.value.code == "store_locked"
        with Store(path, read_only=True) as reader:
            assert reader.jobs().data
    with Store(path) as store:
        with pytest.raises(StoreError, match="Another process"):
            Store(path)
        assert store.jobs().data


@pytest.fixture
def page_limit() -> Iterator[list[int]]:
    """A disk of so many pages, which the test may enlarge, under every database opened meanwhile."""
    limit = [1 << 30]

    def small_disk(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {limit[0]}")

    event.listen(Engine, "checkout", small_disk)
    yield limit
    event.remove(Engine, "checkout", small_disk)


def test_a_full_disk_is_an_error_and_nothing_more(tmp_path: Path, page_limit: list[int]) -> None:
    path = tmp_path / "store.db"
    with Store(path) as store:
        job_id = store.create_job(CONFIG)[0].id
        store.transition(job_id, "running")
        recorder = store.recorder(job_id)
        page_limit[0] = 60
        calls = (LlmCall(number, 0, "mutate", "p", "m", (), "x" * 10_000, "ok", 1, 1, 0.1, 0.0) for number in range(1000))
        with pytest.raises(DiskFullError, match="Free some space") as error:
            deque(map(recorder.save_llm_call, calls), maxlen=0)
        assert error.value.code == "disk_full"
        written = next(calls).sequence - 1
        assert written > 0
        # Reading goes on, and so does writing once there is space; of the refused call nothing is there.
        assert len(store.llm_calls(job_id)) == written
        assert recorder.find_llm_call(written) is None
        page_limit[0] = 1 << 30
        store.transition(job_id, "failed", error=error.value.to_dict())
        assert store.job(job_id).status == "failed"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_no_space_for_a_new_database(tmp_path: Path, page_limit: list[int]) -> None:
    page_limit[0] = 3
    with pytest.raises(DiskFullError):
        Store(tmp_path / "store.db")
    page_limit[0] = 1 << 30
    with Store(tmp_path / "store.db") as store:
        assert store.jobs().data == ()


@pytest.mark.parametrize(
    ("name", "free", "expected"),
    [
        ("SQLITE_FULL", 1 << 40, "disk_full"),
        ("SQLITE_IOERR_SHMSIZE", 0, "disk_full"),
        ("SQLITE_IOERR_WRITE", 1 << 40, "store_failed"),
        ("SQLITE_BUSY", 1 << 40, "store_busy"),
        ("SQLITE_CORRUPT_VTAB", 1 << 40, "store_corrupt"),
    ],
)
def test_sqlite_errors_as_ours(name: str, free: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    error = sqlite3.OperationalError("failed")
    error.sqlite_errorname = name
    assert database.translated(error, tmp_path / "store.db").code == expected


def test_a_damaged_database_says_how_to_recover(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with Store(path) as store:
        recorder = store.recorder(store.create_job(CONFIG)[0].id)
        for number in range(30):
            recorder.save_llm_call(LlmCall(number, 0, "mutate", "p", "m", (), "x" * 10_000, "ok", 1, 1, 0.1, 0.0))
    data = bytearray(path.read_bytes())
    data[8192:] = random.Random(3).randbytes(len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"\.recover") as error:  # noqa: SIM117  (where it shows depends on what is hit)
        with Store(path) as store:
            store.llm_calls(store.jobs().data[0].id)
    assert error.value.code == "store_corrupt"


def test_a_lock_held_in_the_shell_is_waited_for_and_then_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(database, "PRAGMAS", ("busy_timeout = 50", *database.PRAGMAS[1:]))
    with Store(tmp_path / "store.db") as store, closing(sqlite3.connect(store.path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked by another program") as error:
            store.create_job(CONFIG)
        assert error.value.code == "store_busy"
        assert store.jobs().data == ()
        shell.execute("ROLLBACK")
        assert store.create_job(CONFIG)[1]


if __name__ == "__main__":
    write_for_ever(sys.argv[1])
