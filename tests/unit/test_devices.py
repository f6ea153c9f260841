"""Devices as people name them, and what several workers on the CPU get."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from selfpruner import api
from selfpruner.errors import ConfigError
from selfpruner.workers import devices
from selfpruner.workers.base import Session
from selfpruner.workers.process_pool import ProcessPool
from server.settings import load_settings
from tests.helpers import ROOT
from tests.helpers.fake_handler import Echo


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("cuda:0,cuda:1", ("cuda:0", "cuda:1")),
        (" cpu*2 ", ("cpu", "cpu")),
        ("cuda", ("cuda:0",)),
        ("cuda:1*2, cuda:0", ("cuda:1", "cuda:1", "cuda:0")),
        ("auto", ("auto",)),
        (["cpu*3"], ("cpu",) * 3),
    ],
)
def test_names(named: str, found: tuple[str, ...]) -> None:
    assert devices.parse(named) == found


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("cuda:0,cuda:0", r"cuda:0 is named twice.*cuda:0\*2"),
        ("cuda,cuda:0", "cuda:0 is named twice"),
        ("cpu,cpu", r"cpu is named twice.*cpu\*2 puts 2 workers"),
        ("cpu*0", r"cpu\*0 makes no worker"),
        ("cpu*", r"Unknown device 'cpu\*'"),
        ("cpu*-1", "Unknown device"),
        ("tpu", "Unknown device 'tpu'.*There are auto"),
        ("gpu*2", "Did you mean 'cuda'"),
        ("", "Name at least one device"),
        (",", "Name at least one device"),
        ("auto*2", "auto is one device"),
        ("auto,cpu", "auto is one device"),
    ],
)
def test_what_names_no_devices(named: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        devices.parse(named)
    with pytest.raises(ConfigError, match=said):
        api.search(0.2, tmp_path / "out", devices=named)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=f"SELFPRUNER_DEVICES.*{said}"):
        load_settings(devices=named)


def test_what_is_not_here(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    devices.check_here(("cpu",) * cores)
    with pytest.raises(ConfigError, match=rf"more workers than this machine has cores for\. Use at most cpu\*{cores}\."):
        devices.check_here(("cpu",) * (cores + 1))
    with pytest.raises(ConfigError, match=r"Device 'cuda:99' is not here\. This machine has: cpu"):
        api.prune(tmp_path / "out", rate=0.2, devices="cuda:99")
    with pytest.raises(ConfigError, match="Give device or devices"):
        api.evaluate("smollm2-135m", device="cpu", devices="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "count", "each"), [("4", 2, "2"), ("1", 2, "1"), ("4", 1, "4")])
def test_workers_on_the_cpu_share_its_threads(monkeypatch: pytest.MonkeyPatch, given: str, count: int, each: str) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", given)

    async def go() -> list[str]:
        pool = ProcessPool(["cpu"] * count, handler="tests.helpers.fake_handler:FakeHandler")
        try:
            await asyncio.gather(*(pool.run(Session("a", {}, ""), Echo()) for _ in range(count)))
            environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pool.pids]
            return [next(item for item in all_ if item.startswith(b"OMP_NUM_THREADS=")).decode() for all_ in environments]
        finally:
            await pool.close()

    assert asyncio.run(go()) == [f"OMP_NUM_THREADS={each}"] * count


def test_jobs_are_split_over_devices_of_one_kind() -> None:
    async def workers(*named: str) -> int:
        pool = ProcessPool(named)
        try:
            return pool.workers
        finally:
            await pool.close()

    assert asyncio.run(workers("cuda:0", "cuda:1", "cuda:2")) == 3
    assert asyncio.run(workers("cuda:0", "cpu")) == 1
