"""The worker pools under everything that goes wrong: real processes, real signals, a handler without torch."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from selfpruner import errors
from selfpruner.models.memory import peak_mib
from selfpruner.progress import Foreseen
from selfpruner.workers import process_pool
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.process_pool import ProcessPool
from selfpruner.workers.tasks import TaskRequest
from selfpruner.workers.thread_pool import InProcessPool
from tests.helpers import ROOT
from tests.helpers.fake_handler import Crash, Done, Echo, Fail, FakeHandler, Grandchild, Noisy, Note, Stubborn, Unheard
from tests.helpers.ray_cluster import cluster

FAKE = "tests.helpers.fake_handler:FakeHandler"
SESSION = Session("a", {"model": "tiny"}, "cache")


@pytest.fixture(autouse=True)
def _fake_handler_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@asynccontextmanager
async def pool_of(*devices: str, **options: Any) -> AsyncIterator[ProcessPool]:
    options = {"task_timeout": 30.0} | options
    pool = ProcessPool(devices or ("cpu",), handler=FAKE, **options)
    try:
        yield pool
    finally:
        await pool.close()


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with cluster() as made:
        yield made.address


def pool_of_kind(kind: str, address: str | None) -> WorkerPool:
    if kind == "process":
        return ProcessPool(["cpu"], handler=FAKE)
    if kind == "in-process":
        return InProcessPool(lambda: FakeHandler("cpu"))
    from selfpruner.workers.ray_pool import RayPool

    assert address is not None
    return RayPool(address, handler=FAKE)


@asynccontextmanager
async def any_pool(kind: str, address: str | None) -> AsyncIterator[WorkerPool]:
    pool = pool_of_kind(kind, address)
    try:
        yield pool
    finally:
        await pool.close()


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        await asyncio.sleep(0.02)


# Ray is in an environment of its own; see `make test-ray`.
KINDS = ("process", "in-process", *(("ray",) if find_spec("ray") else ()))


def every_pool(test: Callable[[WorkerPool], Awaitable[None]]) -> Callable[[str, pytest.FixtureRequest], None]:
    """Conformance: the same test for every kind of pool."""

    @pytest.mark.parametrize("kind", KINDS)
    def run(kind: str, request: pytest.FixtureRequest) -> None:
        address = request.getfixturevalue("ray_address") if kind == "ray" else None

        async def body() -> None:
            async with any_pool(kind, address) as pool:
                await test(pool)

        asyncio.run(body())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


# -- conformance: what every pool does ---------------------------------------------------------------------------------
@every_pool
async def test_echo_with_progress_and_peak(pool: WorkerPool) -> None:
    said: list[str] = []
    result = await pool.run(SESSION, Echo(say=("one", "two — ü\n"), value={"nan": None}), said.append)
    assert result.value == {"nan": None}
    assert said == ["one", "two — ü\n"]
    assert 5 < result.peak_mib < 10_000
    assert result.sessions == ["a"]


@every_pool
async def test_what_was_foreseen_stays_known_as_that(pool: WorkerPool) -> None:
    said: list[str] = []
    await pool.run(SESSION, Echo(say=("a first preparation takes ages",), foresee="about an hour"), said.append)
    assert [(str(text), isinstance(text, Foreseen)) for text in said] == [
        ("a first preparation takes ages", False),
        ("about an hour", True),
    ]


@every_pool
async def test_five_megabytes_there_and_back(pool: WorkerPool) -> None:
    big = "".join(random.Random(0).choices('abc\n"\\é', k=2_500_000))
    result = await pool.run(SESSION, Echo(value=big))
    assert result.value == big


@every_pool
async def test_errors_keep_their_type(pool: WorkerPool) -> None:
    async def failure(how: str) -> errors.SelfprunerError:
        with pytest.raises(errors.SelfprunerError) as caught:
            await pool.run(SESSION, Fail(how=how))
        return caught.value

    typed = await failure("typed")
    assert type(typed) is errors.UnsupportedModelError
    assert typed.to_dict() == errors.UnsupportedModelError("no adapter for this; use llama", param="model").to_dict()
    own = await failure("own code")
    assert (type(own), own.code) == (errors.ProposerError, "timeout")
    for how in ("memory", "torch memory", "torch cpu memory"):
        assert type(await failure(how)) is errors.OutOfMemoryError, how
    disk = await failure("disk")
    assert type(disk) is errors.DiskFullError
    assert "model.safetensors" in disk.message
    unexpected = await failure("unexpected")
    assert (type(unexpected), unexpected.code) == (errors.WorkerError, "internal_error")
    assert "KeyError: 'surprise'" in unexpected.message
    assert "Traceback" not in unexpected.message
    assert (await pool.run(SESSION, Echo(value=1))).value == 1, "a failed task leaves the worker usable"


@every_pool
async def test_what_is_of_a_wrong_shape_names_the_field(pool: WorkerPool) -> None:
    async def failure(request: TaskRequest[Done]) -> errors.SelfprunerError:
        with pytest.raises(errors.SelfprunerError) as caught:
            await pool.run(SESSION, request)
        return caught.value

    for request, param, words in (
        (Fail(how="wrong type"), "deaths", "Done.deaths: Input should be a valid integer. Both ends"),
        (Fail(how="unchecked"), "pid", r"Done.pid: Input should be a valid integer \(1 more problem\)"),
        (Fail(how="wrong class"), None, "'fail' gave TaskResult, not Done"),
        (Echo.model_construct({"say"}, say=("one", 2)), "say.1", "Echo.say.1: Input should be a valid string"),
        (Note.model_construct({"seconds"}, seconds=0.0), "file", r"Note.file: Field required \(1 more problem\)"),
    ):
        error = await failure(request)
        assert (type(error), error.code, error.param) == (errors.ContractError, "wrong_shape", param)
        assert re.search(words, error.message)
    with pytest.raises(errors.ContractError, match=r"Echo\.sing: Extra inputs are not permitted"):
        Echo.read({"sing": True})
    unknown = await failure(Unheard())
    assert type(unknown) is errors.ConfigError
    assert "Unknown task 'unheard'. Known: echo, note" in unknown.message
    assert (await pool.run(SESSION, Echo(value=1))).value == 1, "a wrong shape leaves the worker usable"


@every_pool
async def test_cancel_is_cooperative_and_leaves_the_pool_usable(pool: WorkerPool) -> None:
    started = asyncio.Event()
    task = asyncio.create_task(pool.run(SESSION, Note(seconds=30, file=os.devnull, text=""), lambda _: started.set()))
    waiting = asyncio.create_task(pool.run(SESSION, Echo()))
    await started.wait()
    pid = pool.pids if isinstance(pool, ProcessPool) else None
    waiting.cancel()
    task.cancel()
    before = time.monotonic()
    for cancelled in (task, waiting):
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    assert time.monotonic() - before < 2.5, "it stopped by itself, before the worker would be killed"
    assert (await pool.run(SESSION, Echo(value=1))).value == 1
    if isinstance(pool, ProcessPool):
        assert pool.pids == pid, "the worker was kept"


@every_pool
async def test_a_closed_pool_refuses(pool: WorkerPool) -> None:
    await pool.close()
    with pytest.raises(errors.WorkerError, match="closed"):
        await pool.run(SESSION, Echo())
    await pool.close()


# -- processes: the protocol -------------------------------------------------------------------------------------------
@in_loop
async def test_stray_prints_go_to_the_log(tmp_path: Path) -> None:
    async with pool_of("cuda:0", log_dir=tmp_path) as pool:
        await pool.run(SESSION, Noisy())
        assert (await pool.run(SESSION, Echo(value=1))).value == 1
        log = (tmp_path / "worker-0-cuda-0.log").read_text()
        assert all(text in log for text in ('"op": "result"', "raw bytes", "grandchild"))
        with pytest.raises(errors.WorkerError, match="SystemExit: 3"):
            await pool.run(SESSION, Fail(how="exit"))
        assert "Traceback" in (tmp_path / "worker-0-cuda-0.log").read_text()
        assert pool.restarts == 0


@in_loop
async def test_a_worker_starts_late_and_stays_warm() -> None:
    async with pool_of("cpu", "cpu") as pool:
        assert (pool.pids, pool.busy) == ([None, None], 0)
        first = await pool.run(SESSION, Echo())
        second = await pool.run(SESSION, Echo())
        assert pool.pids == [first.pid, None]
        assert second.pid == first.pid


@in_loop
async def test_a_handler_that_cannot_be_imported_is_an_error_not_a_loop() -> None:
    pool = ProcessPool(["cpu"], handler="tests.no_such_module:Handler")
    with pytest.raises(errors.WorkerError, match=r"ModuleNotFoundError.*no_such_module"):
        await pool.run(SESSION, Echo())
    assert pool.restarts == 0
    await pool.close()


@in_loop
async def test_failing_progress_callback_stops_the_task(tmp_path: Path) -> None:
    def broken(_: str) -> None:
        raise ZeroDivisionError

    async with pool_of() as pool:
        with pytest.raises(ZeroDivisionError):
            await pool.run(SESSION, Note(seconds=30, file=str(tmp_path / "n"), text=""), broken)
        assert (await pool.run(SESSION, Echo(value=1))).value == 1


def test_peak_is_of_this_process_alone() -> None:
    before = peak_mib()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    after = peak_mib()
    assert after >= before
    code = "from selfpruner.models.memory import peak_mib; print(peak_mib())"
    child = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert child < after - 32, "a child does not inherit its parent's peak"


# -- processes: deaths -------------------------------------------------------------------------------------------------
@in_loop
async def test_killed_while_idle() -> None:
    async with pool_of() as pool:
        first = (await pool.run(SESSION, Echo())).pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: pool.pids == [None], 2)
        second = await pool.run(SESSION, Echo())
        assert second.pid != first
        assert pool.restarts == 1


@in_loop
async def test_a_death_in_a_task_repeats_it(tmp_path: Path) -> None:
    async with pool_of(max_attempts=3) as pool:
        for how in ("SIGKILL", "exit", "SIGSEGV"):
            result = await pool.run(SESSION, Crash(how=how, times=1, file=str(tmp_path / how)))
            assert result.deaths == 1
        assert pool.restarts == 3


@in_loop
async def test_too_many_deaths_are_an_error_that_says_why(tmp_path: Path) -> None:
    async with pool_of(max_attempts=2) as pool:
        for how, words in (("SIGKILL", "SIGKILL.*out of memory"), ("exit", "exited with code 7"), ("SIGABRT", "SIGABRT.*crashed")):
            file = tmp_path / how
            with pytest.raises(errors.WorkerError) as caught:
                await pool.run(SESSION, Crash(how=how, times=9, file=str(file)))
            assert re.search(f"2 workers were lost.*'crash'.*{words}.*last words", caught.value.message, re.DOTALL)
            assert caught.value.code == "worker_failed"
            assert file.read_text() == "xx"
        assert (await pool.run(SESSION, Echo(value=1))).value == 1


@in_loop
async def test_twenty_kills_lose_and_duplicate_nothing(tmp_path: Path) -> None:
    dice = random.Random(7)
    async with pool_of("cpu", "cpu", max_attempts=40, task_timeout=120.0) as pool:
        done: list[str] = []

        async def work(text: str) -> None:
            result = await pool.run(SESSION, Note(seconds=0.02, file=str(tmp_path / "notes"), text=text))
            done.append(result.text)

        async def kill() -> None:
            kills = 0
            while kills < 20:
                await asyncio.sleep(dice.uniform(0.0, 0.4))  # from the start of a worker to the middle of its third task or so
                if running := [pid for pid in pool.pids if pid]:
                    os.kill(dice.choice(running), signal.SIGKILL)
                    kills += 1

        killer = asyncio.create_task(kill())
        wanted: list[str] = []
        while not killer.done():
            wanted += (batch := [str(len(wanted) + i) for i in range(6)])
            await asyncio.gather(*map(work, batch))
        await killer
        assert sorted(done, key=int) == wanted, "one result per task"
        assert set((tmp_path / "notes").read_text().split()) == set(wanted)
        assert 10 <= pool.restarts <= 20


@in_loop
async def test_a_frozen_worker_is_replaced_and_its_late_result_ignored(tmp_path: Path) -> None:
    async with pool_of(heartbeat_timeout=1.5) as pool:
        notes = tmp_path / "notes"
        frozen: list[int] = []

        def freeze_once(_: str) -> None:
            if not frozen:
                frozen.append(pool.pids[0] or 0)
                os.kill(frozen[0], signal.SIGSTOP)

        result = await pool.run(SESSION, Note(seconds=0.3, file=str(notes), text="done"), freeze_once)
        assert result.pid != frozen[0]
        with contextlib.suppress(ProcessLookupError):
            os.kill(frozen[0], signal.SIGCONT)
        assert notes.read_text() == "done\n"
        assert not alive(frozen[0])
        # The same while it has nothing to do.
        os.kill(result.pid, signal.SIGSTOP)
        await until(lambda: pool.pids == [None], 4)
        assert (await pool.run(SESSION, Echo(value=1))).value == 1


@in_loop
async def test_a_busy_worker_is_not_taken_for_frozen(tmp_path: Path) -> None:
    async with pool_of(heartbeat_timeout=1.5) as pool:
        await pool.run(SESSION, Note(seconds=2, file=str(tmp_path / "n"), text=""))
        time.sleep(2)  # nor does a parent that slept blame its worker
        await asyncio.sleep(0.2)
        await pool.run(SESSION, Echo())
        assert pool.restarts == 0


# -- processes: stopping -----------------------------------------------------------------------------------------------
@in_loop
async def test_a_stubborn_task_is_killed_with_what_it_started() -> None:
    async with pool_of() as pool:
        said: asyncio.Queue[str] = asyncio.Queue()
        task = asyncio.create_task(pool.run(SESSION, Grandchild(), said.put_nowait))
        grandchild = int(await said.get())
        pid = pool.pids[0] or 0
        waiting = asyncio.create_task(pool.run(SESSION, Echo(value=1)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, process_pool.CANCEL_GRACE + 1.5)
        await until(lambda: not alive(pid) and not alive(grandchild), 1)
        assert (await waiting).value == 1, "the queue goes on with a new worker"


@in_loop
async def test_task_timeout(tmp_path: Path) -> None:
    async with pool_of(task_timeout=1.0) as pool:
        with pytest.raises(errors.WorkerError, match="longer than 1 s") as caught:
            await pool.run(SESSION, Note(seconds=30, file=str(tmp_path / "n"), text=""))
        assert caught.value.code == "task_timeout"
        assert (await pool.run(SESSION, Echo(value=1))).value == 1


@in_loop
async def test_cancelling_at_any_moment_leaves_the_pool_usable() -> None:
    dice = random.Random(3)
    async with pool_of("cpu", "cpu") as pool:
        for _ in range(40):
            tasks = [asyncio.create_task(pool.run(SESSION, Echo(value=n))) for n in range(4)]
            await asyncio.sleep(dice.choice([0, 0, 0.001, 0.005]))
            for task in dice.sample(tasks, 2):
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for n, result in enumerate(results):
                if not isinstance(result, asyncio.CancelledError):
                    assert isinstance(result, Done)
                    assert result.value == n
        assert pool.busy == 0
        assert (await pool.run(SESSION, Echo(value=1))).value == 1


@in_loop
async def test_close_ends_everything_at_once() -> None:
    async with pool_of("cpu", "cpu", "cpu") as pool:
        idle = (await pool.run(SESSION, Echo())).pid
        started = asyncio.Event()
        running = asyncio.create_task(pool.run(SESSION, Stubborn(), lambda _: started.set()))
        starting = asyncio.create_task(pool.run(Session("b", {}, ""), Echo()))
        await started.wait()
        queued = [asyncio.create_task(pool.run(SESSION, Stubborn())) for _ in range(4)]
        await asyncio.sleep(0)
        before = time.monotonic()
        await pool.close()
        assert time.monotonic() - before < 3
        for task in (running, *queued):
            with pytest.raises(errors.WorkerError, match="closed"):
                await task
        await asyncio.gather(starting, return_exceptions=True)
        assert not alive(idle)
    left = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=False).stdout
    assert "selfpruner.workers.child" not in left
    assert "defunct" not in left


def test_a_worker_whose_parent_was_killed_is_gone_within_two_seconds() -> None:
    parent = f"""
import asyncio
from selfpruner.workers.base import Session
from selfpruner.workers.process_pool import ProcessPool
from tests.helpers.fake_handler import Echo, Grandchild
async def main():
    pool = ProcessPool(["cpu", "cpu"], handler={FAKE!r})
    session = Session("a", {{}}, "")
    print((await pool.run(session, Echo())).pid, flush=True)
    say = lambda pid: print(pid, pool.pids[0], pool.pids[1], flush=True)
    await asyncio.gather(*(pool.run(session, Grandchild(), say) for _ in range(2)))
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pids = {int(pid) for _ in range(3) for pid in server.stdout.readline().split() if pid != "None"}
        assert len(pids) == 4, "two workers and what they started"
        server.kill()
    end = time.monotonic() + 2
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(alive, pids))


# -- several tasks -----------------------------------------------------------------------------------------------------
@in_loop
async def test_two_devices_work_at_the_same_time(tmp_path: Path) -> None:
    async with pool_of("cuda:0", "cuda:1") as pool:
        note = Note(seconds=0.6, file=str(tmp_path / "n"), text="")
        await asyncio.gather(*(pool.run(SESSION, Echo()) for _ in range(2)))
        first, second = await asyncio.gather(*(pool.run(SESSION, note) for _ in range(2)))
        assert {first.device, second.device} == {"cuda:0", "cuda:1"}
        assert max(first.started, second.started) < min(first.ended, second.ended)


@in_loop
async def test_a_session_returns_to_its_worker() -> None:
    sessions = [Session(key, {}, "") for key in "abab"]
    async with pool_of("cpu", "cpu") as pool:
        for _ in range(3):
            results = [await pool.run(session, Echo()) for session in sessions]
        assert [result.sessions for result in results] == [["a"], ["b"], ["a"], ["b"]]


@in_loop
async def test_sessions_at_work_share_the_workers_and_do_not_drive_each_other_out() -> None:
    """The second finds both workers taken by the first, gets one of them, and each keeps its own."""
    one, other = (Session(key, {}, "") for key in "ab")
    async with pool_of("cpu", "cpu") as pool:
        await asyncio.gather(*(pool.run(one, Echo()) for _ in range(8)))
        jobs = [asyncio.gather(*(pool.run(session, Echo()) for _ in range(12))) for session in (one, other)]
        first, second = [await job for job in jobs]
        assert len({result.pid for result in second}) == 1
        assert {tuple(result.sessions) for result in second} == {("a", "b")}
        assert sum(result.sessions == ["a", "b", "a"] for result in first) == 0, "no worker changes back and forth"


@in_loop
async def test_a_session_that_rests_lets_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process_pool, "_RESTED", 0.5)
    one, other = (Session(key, {}, "") for key in "ab")
    async with pool_of("cpu", "cpu") as pool:
        await pool.run(one, Echo())
        held = Note(seconds=2.0, file=str(tmp_path / "notes"), text="x")
        running = asyncio.create_task(pool.run(other, held))
        await until(lambda: pool.busy == 1, 2)
        started = time.monotonic()
        await pool.run(other, Echo())
        assert 0.2 < time.monotonic() - started < 1.9, "neither at once nor when its own worker is free"
        await running


@in_loop
async def test_the_queue_prefers_the_session_held_but_starves_none() -> None:
    order: list[str] = []

    async def work(pool: ProcessPool, key: str) -> None:
        await pool.run(Session(key, {}, ""), Echo())
        order.append(key)

    async with pool_of() as pool:
        await asyncio.gather(*(work(pool, key) for key in "a" + "b" + "a" * 20))
        assert order[:5] == list("aaaaa")
        assert order.index("b") <= 10
