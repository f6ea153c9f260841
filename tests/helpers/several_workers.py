"""Several workers for tests: real ones in this process, and one without a model that scores by a formula and takes its time."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.race import SEGMENT
from selfpruner.jobs.handler import SessionHandler
from selfpruner.progress import OnProgress
from selfpruner.workers.base import Session, TaskHandler
from selfpruner.workers.tasks import (
    EvaluateRequest,
    EvaluateResult,
    Levels,
    R,
    ScoreRow,
    SequenceSums,
    TaskRequest,
)
from selfpruner.workers.thread_pool import InProcessPool


class SeveralWorkers:
    """A pool of ``workers``, each with a model of its own; ``asked`` are all requests in order. They take turns, because what a
    process notes of the cache it uses is for one worker in it."""

    def __init__(self, workers: int, handler: Callable[[str], TaskHandler] = SessionHandler) -> None:
        self.workers = workers
        self.asked: list[TaskRequest[Any]] = []
        self._pools = [InProcessPool(lambda: handler("cpu")) for _ in range(workers)]
        self._turn = asyncio.Lock()
        self._idle: asyncio.Queue[InProcessPool] = asyncio.Queue()
        for pool in self._pools:
            self._idle.put_nowait(pool)

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        self.asked.append(request)
        pool = await self._idle.get()
        try:
            async with self._turn:
                return await pool.run(session, request, on_progress)
        finally:
            self._idle.put_nowait(pool)

    async def close(self) -> None:
        for pool in self._pools:
            await pool.close()


class Formula:
    """A TaskHandler. The session's config says the text's ``length``, the ``seconds`` a sequence takes by device, and a ``notes``
    file, where a line tells of every piece that was begun and ended."""

    def __init__(self, device: str) -> None:
        self._device = device

    @property
    def requests(self) -> Sequence[type[TaskRequest[Any]]]:
        return (EvaluateRequest,)

    def handle(self, session: Session, request: TaskRequest[R], progress: OnProgress, cancelled: Callable[[], bool]) -> Any:  # noqa: ARG002
        assert isinstance(request, EvaluateRequest)
        config: dict[str, Any] = dict(session.config)
        named = ",".join(map(str, request.sequences))
        note(Path(config["notes"]), f"begun {self._device} {os.getpid()} {named}")
        until = time.monotonic() + config["seconds"][self._device] * len(request.sequences)
        while time.monotonic() < until:
            if cancelled():
                note(Path(config["notes"]), f"stopped {self._device} {os.getpid()} {named}")
                raise CancelledTaskError("stopped as asked")
            time.sleep(0.005)
        length = int(config["fitness_text"]["length"])
        sums = [[formula(levels, number, length) for number in request.sequences] for levels in request.plans]
        note(Path(config["notes"]), f"ended {self._device} {os.getpid()} {named}")
        rows = []
        for plan in sums:
            kl = sum(map(sum, plan)) / length / len(plan)
            rows.append(ScoreRow(kl=kl, nll=3 + kl, tokens=length * len(plan)))
        return EvaluateResult(
            rows=tuple(rows),
            seconds=0.1,
            passes=0,
            passes_without_sharing=0,
            sums=SequenceSums(
                length=length,
                kl=tuple(tuple(value for part in plan for value in part) for plan in sums),
                nll=tuple(tuple((3 + sum(part) / length) * (length - 1) for part in plan) for plan in sums),
            )
            if request.sums
            else None,
        )


def formula(levels: Levels, sequence: int, length: int) -> list[float]:
    """Sums of the KL over the stretches of one sequence."""
    noise = random.Random(f"{levels} {sequence}").random()
    widths = [min(SEGMENT, length - start) for start in range(0, length, SEGMENT)]
    return [width * (sum(levels) + 0.1 * noise) for width in widths]


def note(file: Path, line: str) -> None:
    with file.open("a") as opened:
        opened.write(line + "\n")
