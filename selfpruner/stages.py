"""Where the time of a job goes: seconds, tokens, workers and memory by stage. For people; nothing is decided by it.

A moment belongs to one stage, the innermost of those that are open, so all of them add up to the whole. A job has one
:class:`Stages`. So has every task on a worker, where whoever does a part of it says so with :func:`at`: it needs not be handed
down to there. What a job's tasks say of their parts takes its place among the job's own stages.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal, get_args

# In the order of a job. "waiting" is for a worker to start or to be free, "thinking" for the LLM; "writing" is the probe of how
# plans write, and "other" what no stage claims: decisions and the database.
StageName = Literal[
    "loading",
    "texts",
    "statistics",
    "ordering",
    "factors",
    "probes",
    "scoring",
    "thinking",
    "waiting",
    "surveys",
    "final",
    "writing",
    "front",
    "report",
    "timing",
    "export",
    "verification",
    "baseline",
    "other",
]
STAGES: tuple[StageName, ...] = get_args(StageName)
# What these are made of says the worker. Elsewhere a task belongs to the stage that asked for it: that a worker takes another one's
# place, and makes itself ready first, is part of what the stage took.
COMPOSED: frozenset[StageName] = frozenset({"loading", "export"})

LEAST = 0.001  # seconds


@dataclass(frozen=True, slots=True)
class Stage:
    """``seconds`` of wall-clock time; ``tokens`` that were read, written or scored, of every plan its own; on so many ``workers``;
    ``peak_mib``: the largest resident size of a worker meanwhile, in MiB."""

    name: StageName
    seconds: float = 0.0
    tokens: int = 0
    workers: int = 0
    peak_mib: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker did for a stage: asked for, begun and ended at these times of the clock."""

    asked: float
    begun: float
    ended: float
    worker: str
    peak_mib: float
    parts: Sequence[Stage] = ()


class Stages:
    """``before``: what was spent until now. ``peak`` gives the largest size of this process, in MiB, since it was last asked."""

    def __init__(
        self,
        before: Iterable[Stage] = (),
        *,
        clock: Callable[[], float] = time.perf_counter,
        peak: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.clock = clock
        self._peak = peak
        self._rows = {stage.name: stage for stage in before}
        self._workers: defaultdict[StageName, set[str]] = defaultdict(set)
        self._tasks: list[Task] = []
        self._open: list[StageName] = ["other"]
        self._since = clock()
        peak()

    @contextmanager
    def at(self, name: StageName) -> Iterator[None]:
        """What is done here belongs to ``name``. For one thread, and one coroutine, at a time: what goes on beside it takes none of
        a job's time."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def count(self, tokens: int, name: StageName | None = None) -> None:
        """Add tokens to a stage, by default the present one."""
        self._add(name or self._open[-1], tokens=tokens)

    def did(self, task: Task) -> None:
        """Take in a task of the present stage; several may have run at once."""
        self._tasks.append(task)

    def rows(self) -> list[Stage]:
        """Up to now, in the order of a job, without those that were over at once and of which nothing is known."""
        self._settle()
        rows = [self._rows[name] for name in STAGES if name in self._rows]
        return [row for row in rows if row.seconds >= LEAST or row.tokens or row.workers or row.peak_mib]

    def _settle(self) -> None:
        """Give the time since the last call to the present stage, to what its tasks were made of, and to waiting for them."""
        now, name, tasks = self.clock(), self._open[-1], self._tasks
        spent, self._since, self._tasks = now - self._since, now, []
        worked = _covered([(task.begun, task.ended) for task in tasks])
        waited = max(_covered([(task.asked, task.ended) for task in tasks]) - worked, 0.0)
        if waited:
            self._add("waiting", waited)
        spent -= waited
        if name in COMPOSED:
            # Side by side, tasks take less of the job's time than of the workers'.
            share = min(1.0, worked / busy) if (busy := sum(task.ended - task.begun for task in tasks)) else 0.0
            for task in tasks:
                for part in task.parts:
                    if part.name != "other":
                        self._add(part.name, part.seconds * share, part.tokens, part.peak_mib, task.worker)
                        spent -= part.seconds * share
        self._add(name, max(spent, 0.0), peak_mib=self._peak())
        for task in tasks:
            own = [part.peak_mib for part in task.parts if part.name == "other"] if name in COMPOSED else [task.peak_mib]
            self._add(name, peak_mib=max(own, default=0.0), worker=task.worker)

    def _add(self, name: StageName, seconds: float = 0.0, tokens: int = 0, peak_mib: float = 0.0, worker: str = "") -> None:
        if worker:
            self._workers[name].add(worker)
        old = self._rows.get(name, Stage(name))
        self._rows[name] = replace(
            old,
            seconds=old.seconds + seconds,
            tokens=old.tokens + tokens,
            workers=max(old.workers, len(self._workers[name])),
            peak_mib=max(old.peak_mib, peak_mib),
        )


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of what ``spans`` cover together."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


# -- on a worker -------------------------------------------------------------------------------------------------------
_of_task: ContextVar[Stages | None] = ContextVar("stages", default=None)


@contextmanager
def collecting(stages: Stages) -> Iterator[None]:
    """Inside, and in this thread, :func:`at` and :func:`count_tokens` mean ``stages``."""
    token = _of_task.set(stages)
    try:
        yield
    finally:
        _of_task.reset(token)


@contextmanager
def at(name: StageName) -> Iterator[None]:
    """What is done here belongs to ``name``, if anybody wants to know."""
    stages = _of_task.get()
    if stages is None:
        yield
    else:
        with stages.at(name):
            yield


def count_tokens(tokens: int) -> None:
    """Add tokens to the present stage."""
    stages = _of_task.get()
    if stages is not None:
        stages.count(tokens)
