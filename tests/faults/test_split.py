"""An evaluation that is split over worker processes: killed, slow and unwanted ones."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from selfpruner.evaluation import split
from selfpruner.workers.base import Session
from selfpruner.workers.process_pool import CANCEL_GRACE, ProcessPool
from selfpruner.workers.tasks import EvaluateRequest, EvaluateResult
from tests.helpers import ROOT

REQUEST = EvaluateRequest(plans=((0, 1), (2, 1), (3, 3)), text="fitness", sequences=tuple(range(16)))


@pytest.fixture(autouse=True)
def _handler_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def session(folder: Path, **seconds: float) -> Session:
    """Seconds that a sequence takes on the devices ``cpu:a`` and ``cpu:b``."""
    notes = folder / "notes"
    notes.touch()
    by_device = {f"cpu:{name}": value for name, value in seconds.items()}
    return Session("s", {"fitness_text": {"length": 512}, "notes": str(notes), "seconds": by_device}, str(folder))


def pool_of(*devices: str) -> ProcessPool:
    return ProcessPool(devices, handler="tests.helpers.several_workers:Formula", task_timeout=60)


def noted(folder: Path, what: str) -> list[list[str]]:
    """Device, process and sequences of every piece that was so."""
    notes = folder / "notes"
    lines = [line.split() for line in notes.read_text().splitlines()] if notes.exists() else []
    return [line[1:] for line in lines if line[0] == what]


async def once(folder: Path, what: str, count: int) -> None:
    until = time.monotonic() + 30
    while len(noted(folder, what)) < count:
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


def test_a_killed_worker_costs_its_own_piece(tmp_path: Path) -> None:
    async def go() -> tuple[EvaluateResult, EvaluateResult]:
        pool, alone = pool_of("cpu:a", "cpu:b"), pool_of("cpu:a")
        here = session(tmp_path, a=0.15, b=0.15)
        try:
            await split.evaluate(pool, session(tmp_path, a=0.01, b=0.01), REQUEST)  # both have started
            (tmp_path / "notes").unlink()
            asked = asyncio.create_task(split.evaluate(pool, here, REQUEST))
            await once(tmp_path, "begun", 2)
            os.kill(int(noted(tmp_path, "begun")[0][1]), signal.SIGKILL)
            found = await asked
            assert pool.restarts == 1
            begun = Counter(sequences for *_, sequences in noted(tmp_path, "begun"))
            killed = noted(tmp_path, "begun")[0][2]
            assert begun == {sequences: 1 + (sequences == killed) for sequences in begun}, "only that piece ran again"
            return found, await split.evaluate(alone, session(tmp_path, a=0.0), REQUEST)
        finally:
            await pool.close()
            await alone.close()

    found, whole = asyncio.run(go())
    assert [row.kl for row in found.rows] == pytest.approx([row.kl for row in whole.rows], rel=1e-12)
    assert [row.nll for row in found.rows] == pytest.approx([row.nll for row in whole.rows], rel=1e-12)


def test_a_slow_worker_gets_less(tmp_path: Path) -> None:
    async def go() -> None:
        pool = pool_of("cpu:a", "cpu:b")
        try:
            here = session(tmp_path, a=0.01, b=0.01)
            await split.evaluate(pool, here, REQUEST)
            (tmp_path / "notes").unlink()
            await split.evaluate(pool, session(tmp_path, a=0.1, b=0.3), REQUEST)
        finally:
            await pool.close()

    asyncio.run(go())
    assert Counter(device for device, *_ in noted(tmp_path, "ended")) == {"cpu:a": 3, "cpu:b": 1}


def test_cancelling_stops_all_pieces(tmp_path: Path) -> None:
    async def go() -> None:
        pool = pool_of("cpu:a", "cpu:b")
        try:
            asked = asyncio.create_task(split.evaluate(pool, session(tmp_path, a=5.0, b=5.0), REQUEST))
            await once(tmp_path, "begun", 2)
            asked.cancel()
            started = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert time.monotonic() - started < CANCEL_GRACE
            assert pool.busy == 0
        finally:
            await pool.close()

    asyncio.run(go())
    assert len(noted(tmp_path, "stopped")) == 2
    assert len(noted(tmp_path, "begun")) == 2, "the pieces that waited were never begun"
