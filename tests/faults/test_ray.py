"""The pool on a Ray cluster where distance matters: nodes that leave and join, killed servers, folders that are not shared.

`make test-ray` runs these; elsewhere there is no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed here: make test-ray")

from selfpruner.errors import ConfigError, ModelNotFoundError, WorkerError
from selfpruner.files import cache_folder
from selfpruner.workers import ray_pool, ray_relay
from selfpruner.workers.base import Session
from selfpruner.workers.ray_pool import RayPool
from tests.helpers import ROOT
from tests.helpers.fake_handler import Crash, Done, Echo, Fail, Note
from tests.helpers.ray_cluster import cluster

FAKE = "tests.helpers.fake_handler:FakeHandler"
SESSION = Session("a", {"model": "tiny"}, "cache")


async def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        await asyncio.sleep(0.05)


async def both_started(pool: RayPool, file: Path) -> set[int]:
    """The processes of two workers, each kept busy until the other has started."""
    for _ in range(10):
        done = await asyncio.gather(*(pool.run(SESSION, Note(seconds=0.5, file=str(file), text="warm")) for _ in range(4)))
        pids = {each.pid for each in done}
        if len(pids) == 2:
            return pids
    raise AssertionError("only one worker took tasks")


def test_a_lost_node_costs_only_what_it_was_doing(tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    async def body(made: Any) -> list[Done]:
        pool = RayPool(made.address, handler=FAKE)
        try:
            await both_started(pool, tmp_path / "warm")
            work = asyncio.gather(*(pool.run(SESSION, Note(seconds=0.4, file=str(notes), text=str(n))) for n in range(8)))
            await asyncio.sleep(0.6)
            await asyncio.to_thread(made.remove_node, made.worker_nodes.copy().pop())
            return await work
        finally:
            await pool.close()

    with cluster(2) as made:
        asyncio.run(body(made))
    written = notes.read_text().split()
    # Each once: a task that its node did not live to finish has written nothing there.
    assert sorted(written, key=int) == [str(n) for n in range(8)]


def test_a_node_that_joins_takes_waiting_tasks(tmp_path: Path) -> None:
    async def body(made: Any) -> None:
        pool = RayPool(made.address, handler=FAKE)
        try:
            first = await pool.run(SESSION, Echo())
            work = asyncio.gather(*(pool.run(SESSION, Note(seconds=1.0, file=str(tmp_path / "n"), text=str(n))) for n in range(16)))
            made.add_node(num_cpus=1)  # installs signal handlers: not in a thread
            pids = {each.pid for each in await work}
            assert first.pid in pids
            assert len(pids) == 2
        finally:
            await pool.close()

    with cluster(1) as made:
        asyncio.run(body(made))


def test_without_any_node_left_tasks_fail_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_pool, "ALONE_SECONDS", 1.0)

    async def body(made: Any) -> None:
        node = made.add_node(num_cpus=1)
        pool = RayPool(made.address, handler=FAKE)
        try:
            assert len(pool.devices) == 1  # the head has no core to give
            await pool.run(SESSION, Echo())
            await asyncio.to_thread(made.remove_node, node)
            with pytest.raises(WorkerError, match="No worker is left in the Ray cluster"):
                await pool.run(SESSION, Note(seconds=0.1, file=str(tmp_path / "n"), text="x"))
        finally:
            await pool.close()

    with cluster(1, head_cores=0) as made:
        asyncio.run(body(made))


SERVER = """
import asyncio, sys
from selfpruner.workers.base import Session
from selfpruner.workers.ray_pool import RayPool
from tests.helpers.fake_handler import Echo, Note

async def main():
    pool = RayPool(sys.argv[1], handler={fake!r}, name="server")
    done = await pool.run(Session("a", {{}}, "cache"), Echo())
    print(done.pid, flush=True)
    await pool.run(Session("a", {{}}, "cache"), Note(seconds=60.0, file=sys.argv[2], text="never"))

asyncio.run(main())
"""


def test_a_killed_server_finds_its_workers_again_and_their_task_was_stopped(tmp_path: Path) -> None:
    async def again(address: str) -> Done:
        pool = RayPool(address, handler=FAKE, name="server")
        try:
            return await pool.run(SESSION, Echo())
        finally:
            await pool.close()

    with cluster(1) as made:
        command = [sys.executable, "-c", SERVER.format(fake=FAKE), made.address, str(tmp_path / "notes")]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        time.sleep(1)
        server.kill()
        server.wait()
        server.stdout.close()
        os.kill(pid, 0)  # the worker is still there
        assert asyncio.run(again(made.address)).pid == pid
        with pytest.raises(ProcessLookupError):  # and ended with the pool that found it
            os.kill(pid, 0)
    assert not (tmp_path / "notes").exists()


def test_a_worker_nobody_asks_for_ends_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_pool, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(ray_pool, "TOUCH_SECONDS", 0.5)

    async def body(address: str) -> int:
        pool = RayPool(address, handler=FAKE, name="server")
        done = await pool.run(SESSION, Note(seconds=5.0, file=str(tmp_path / "n"), text="x"))  # longer than the lease
        for slot in pool._slots:  # as if this process were dead
            assert isinstance(slot.link, ray_pool.RayConnection)
            for task in slot.link._tasks:
                task.cancel()
        await asyncio.to_thread(gone, done.pid, 10.0)
        await pool.close()
        return done.pid

    def gone(pid: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.kill(pid, 0)
                time.sleep(0.1)
            raise AssertionError("the worker is still there")

    with cluster(1) as made:
        asyncio.run(body(made.address))


def test_a_crash_says_why_and_on_which_node(tmp_path: Path) -> None:
    async def body(address: str) -> None:
        pool = RayPool(address, handler=FAKE, max_attempts=2)
        try:
            with pytest.raises(WorkerError, match=r"2 workers were lost on the task 'crash'.*of node .* was ended by SIGKILL"):
                await pool.run(SESSION, Crash(how="SIGKILL", times=5, file=str(tmp_path / "deaths")))
            assert (await pool.run(SESSION, Echo(value=1))).value == 1
        finally:
            await pool.close()

    with cluster(1) as made:
        asyncio.run(body(made.address))


def test_files_of_one_node_reach_another(tmp_path: Path) -> None:
    """What the pool asks of two nodes without a common folder, each played by a relay."""

    async def body() -> None:
        there, here = tmp_path / "there", tmp_path / "here"
        entry = there / "statistics" / "abc"
        entry.mkdir(parents=True)
        (entry / "layer-0000.safetensors").write_bytes(b"x" * 1000)
        (entry / "layer-0001.safetensors").write_bytes(b"y" * 1000)
        (there / "texts").mkdir()
        (there / "texts" / "old.safetensors").write_bytes(b"z")
        os.utime(there / "texts" / "old.safetensors", (1, 1))
        (there / "models" / "m").mkdir(parents=True)
        cache_folder.use(entry, "m", "on text")
        cache_folder.let_go()
        relay = ray_relay.Relay(FAKE, "cpu", 60, {}, 60)
        entries = relay.used_entries(str(there), since=60)
        assert entries == ["statistics/abc"]
        for name in relay.listing(str(there), entries).keys() - relay.listing(str(here), entries).keys():
            relay.write(str(here), name, relay.read(str(there), name))
        assert (here / "statistics" / "abc" / "layer-0001.safetensors").read_bytes() == b"y" * 1000
        assert relay.listing(str(here), entries) == relay.listing(str(there), entries)

    asyncio.run(body())


def test_errors_of_a_node_name_it() -> None:
    async def body(address: str) -> None:
        pool = RayPool(address, handler=FAKE)
        try:
            with pytest.raises(ModelNotFoundError, match=r"On node .* Every node needs the model's files"):
                await pool.run(SESSION, Fail(how="model"))
        finally:
            await pool.close()

    with cluster(1) as made:
        asyncio.run(body(made.address))


@pytest.mark.parametrize("address", ["", "auto", "ray://127.0.0.1:10001", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:99999", "a:b"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        RayPool(address)


def test_nobody_at_the_address() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"No Ray cluster answers at 127.0.0.1:{port}.*ray start --head"):
        RayPool(f"127.0.0.1:{port}")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("devices", [("cuda:1",), ("cpu", "cuda:0"), ("cuda:0", "cuda:0"), ("auto", "auto"), ("mps",)])
def test_devices_of_a_cluster(devices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="those of every node: auto, cuda"):
        RayPool("127.0.0.1:6379", devices=devices)


def test_a_cluster_without_gpus_and_two_workers_of_one_node() -> None:
    async def body(address: str) -> None:
        with pytest.raises(ConfigError, match="has no GPU"):
            RayPool(address, devices=("cuda:0",))
        pool = RayPool(address, devices=("cpu", "cpu"), handler=FAKE)
        try:
            assert len(pool.devices) == 2
            done = await asyncio.gather(*(pool.run(SESSION, Echo()) for _ in range(2)))
            assert {each.device for each in done} == {"cpu"}
        finally:
            await pool.close()

    with cluster(1) as made:
        asyncio.run(body(made.address))


def test_ctrl_c_leaves_nothing_on_the_cluster(tmp_path: Path) -> None:
    code = SERVER.format(fake=FAKE).replace(', name="server"', "")
    with cluster(1) as made:
        server = subprocess.Popen(
            [sys.executable, "-c", code, made.address, str(tmp_path / "n")], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        server.send_signal(signal.SIGKILL)
        server.wait()
        server.stdout.close()
        asyncio.run(until(lambda: not Path(f"/proc/{pid}").exists(), 20))
