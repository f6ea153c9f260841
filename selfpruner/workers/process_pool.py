"""A pool of worker processes, one per device.

A worker starts with the first task that needs it and stays warm. When it dies or freezes, it is replaced and its task runs again,
at most ``max_attempts`` times; a result that arrived before the death counts.

Tasks wait in a queue when no worker is free for them. A worker that serves a session is free for that one first: to prepare another
takes longer than most tasks. It changes over when its session rests, or has more workers than the other would then have; so
sessions that are at work at the same time share the workers evenly.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from selfpruner.errors import ConfigError, WorkerError, from_dict
from selfpruner.models.memory import ENVIRONMENT
from selfpruner.progress import Foreseen, OnProgress
from selfpruner.workers.base import Session
from selfpruner.workers.devices import threads
from selfpruner.workers.tasks import R, TaskRequest
from selfpruner.workers.worker_process import Connection, Link, Message

CANCEL_GRACE = 3.0  # seconds a cancelled task gets before its worker is killed
_BACKOFF_FIRST, _BACKOFF_MOST = 0.1, 5.0  # seconds before a worker that died twice in a row starts again
_PASSED_OVER_MOST = 8  # times a waiting task may see tasks of a worker's own session go first
_RESTED = 20.0  # seconds without a task after which a session's workers are free for others


class DeviceGoneError(Exception):
    """The device has left, as a node of a cluster does; its task is another worker's."""


@dataclass(slots=True, eq=False)
class Slot:
    """One device and the worker on it, if one was started. ``task`` is the number of the task it was sent and has not answered;
    ``gone``: the device has left; ``serves``: whose task it was given last, ``session``: which one it holds."""

    device: str
    log: Path
    link: Connection | None = None
    gone: bool = False
    serves: str | None = None
    session: str | None = None
    busy: bool = False
    used: float = -math.inf  # when its last task ended, by the loop's clock
    task: int | None = None
    starts: int = 0
    deaths: int = 0  # in a row, without a task done in between


@dataclass(slots=True, eq=False)
class _Waiter:
    session: str
    slot: asyncio.Future[Slot]
    passed_over: int = field(default=0)


class ProcessPool:
    """A :class:`~selfpruner.workers.base.WorkerPool` of child processes on this machine.

    Args:
        devices: one worker is made for each, with this name as its device ("cpu", "cuda:0"). Those of several "cpu" share the
            threads there are.
        handler: ``module:Class`` of the TaskHandler; imported in the worker only.
        log_dir: where workers log, one file each; a temporary folder that ``close`` removes when None.
        max_attempts: how many workers one task may cost.
        task_timeout: seconds one task may take once it has a worker, all attempts together; None for no limit.
        heartbeat_timeout: seconds of silence after which a worker counts as frozen.
        environment: variables that workers get unless they are set here.
    """

    def __init__(
        self,
        devices: Sequence[str],
        *,
        handler: str = "selfpruner.jobs.handler:SessionHandler",
        log_dir: Path | None = None,
        max_attempts: int = 3,
        task_timeout: float | None = None,
        heartbeat_timeout: float = 60.0,
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> None:
        if not devices:
            raise ConfigError("A worker pool needs at least one device.", param="devices")
        self._handler = handler
        self._max_attempts = max_attempts
        self._task_timeout = task_timeout
        self._heartbeat_timeout = heartbeat_timeout
        self._environment = environment
        on_cpu = [device for device in devices if device == "cpu"]
        self._threads = max(1, threads() // len(on_cpu)) if len(on_cpu) > 1 else None
        self._temporary = None if log_dir else Path(tempfile.mkdtemp(prefix="selfpruner-workers-"))
        folder = log_dir or self._temporary
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._slots: list[Slot] = []
        for device in devices:
            self._slots.append(self._slot(device))
        self._waiting: list[_Waiter] = []
        # A worker that an earlier pool left must not have its answer taken for one of ours.
        self._numbers = itertools.count(random.getrandbits(48))
        self._closing = asyncio.Event()
        self._settling: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None  # the next look for workers whose session rests

    def _slot(self, device: str) -> Slot:
        return Slot(device, self._folder / f"worker-{len(self._slots)}-{re.sub(r'[^a-zA-Z0-9]+', '-', device)}.log")

    # -- what it is doing ----------------------------------------------------------------------------------------------
    @property
    def devices(self) -> list[str]:
        return [slot.device for slot in self._slots]

    @property
    def pids(self) -> list[int | None]:
        """One per device; None where no worker runs (not started yet, or dead and not needed since)."""
        return [slot.link.pid if slot.link is not None and slot.link.alive else None for slot in self._slots]

    @property
    def workers(self) -> int:
        """Those on devices of one kind can share a job: numbers that other kinds give are not quite the same."""
        kinds = {slot.device.partition(":")[0] for slot in self._slots}
        return len(self._slots) if len(kinds) == 1 else 1

    @property
    def busy(self) -> int:
        return sum(slot.busy for slot in self._slots)

    @property
    def restarts(self) -> int:
        """Workers that were started to replace another one."""
        return sum(max(slot.starts - 1, 0) for slot in self._slots)

    # -- tasks ---------------------------------------------------------------------------------------------------------
    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        """See :meth:`selfpruner.workers.base.WorkerPool.run`. Returns, or raises, only after the work has stopped."""
        while True:
            slot = await self._acquire(session.key)
            try:
                async with asyncio.timeout(self._task_timeout) as limit:
                    return request.result_type().read(await self._attempts(slot, session, request, on_progress))
            except DeviceGoneError:
                slot.gone = True
            except TimeoutError:
                if not limit.expired():
                    raise
                raise WorkerError(
                    f"The task {request.kind!r} took longer than {self._task_timeout:g} s and was stopped. Allow more time or ask "
                    "for less.",
                    code="task_timeout",
                ) from None
            finally:
                if slot.task is None:
                    self._free(slot)
                else:
                    settling = asyncio.create_task(self._settle(slot))
                    self._settling.add(settling)
                    settling.add_done_callback(self._settling.discard)
                    await asyncio.shield(settling)

    async def close(self) -> None:
        """End all workers; tasks still waiting or running fail with a WorkerError. Later calls do nothing."""
        self._closing.set()
        if self._look is not None:
            self._look.cancel()
        self._fail_waiting(_closed())
        while True:
            await asyncio.gather(*(self._retire(slot) for slot in self._slots))
            if not self.busy:
                break
            await asyncio.sleep(0.01)  # a task that was starting a worker notices that the pool closes
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    async def _attempts(self, slot: Slot, session: Session, request: TaskRequest[R], on_progress: OnProgress | None) -> object:
        task = {"op": "task", "session": asdict(session), "kind": request.kind, "payload": request.to_json()}
        for attempt in itertools.count(1):
            link = await self._started(slot)
            slot.task = next(self._numbers)
            slot.session = session.key
            await link.send({**task, "id": slot.task})
            reply = await self._reply(slot, link, on_progress)
            slot.task = None
            if reply is not None:
                slot.deaths = 0
                if reply["op"] == "error":
                    raise from_dict(reply["error"])
                return reply["result"]
            slot.deaths += 1
            await self._retire(slot)
            if self._closing.is_set():
                raise _closed()
            if attempt >= self._max_attempts:
                tries = f"{attempt} workers were lost" if attempt > 1 else "The worker was lost"
                raise WorkerError(f"{tries} on the task {request.kind!r}. The worker on {slot.device} {link.cause()}")
        raise AssertionError("unreachable")

    async def _reply(self, slot: Slot, link: Connection, on_progress: OnProgress | None) -> Message | None:
        """The result or error of the slot's task; None when the worker died first."""
        while (message := await link.inbox.get()) is not None:
            if message["id"] != slot.task:
                continue
            if message["op"] != "progress":
                return message
            if on_progress is not None:
                on_progress(Foreseen(message["text"]) if message["foreseen"] else message["text"])
        return None

    async def _settle(self, slot: Slot) -> None:
        """Stop a task nobody waits for any more: ask, then kill; then give the worker to the next one."""
        link = slot.link
        assert link is not None
        try:
            async with asyncio.timeout(CANCEL_GRACE):
                await link.send({"op": "cancel", "id": slot.task})
                answered = await self._reply(slot, link, None) is not None
        except TimeoutError:
            answered = False
        slot.task = None
        if not answered:
            await self._retire(slot)
        self._free(slot)

    # -- workers -------------------------------------------------------------------------------------------------------
    async def _started(self, slot: Slot) -> Connection:
        """The slot's worker, a new one when it has none or it died."""
        if slot.link is not None and slot.link.alive:
            return slot.link
        await self._retire(slot)
        if slot.deaths > 1:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), min(_BACKOFF_FIRST * 2 ** (slot.deaths - 2), _BACKOFF_MOST))
        if self._closing.is_set():
            raise _closed()
        slot.link = await self._launch(slot)
        slot.starts += 1
        return slot.link

    async def _launch(self, slot: Slot) -> Connection:
        """A new worker on the slot's device. Raises WorkerError, and DeviceGoneError where the device has left."""
        try:
            shared = {"OMP_NUM_THREADS": str(self._threads)} if self._threads and slot.device == "cpu" else {}
            environment = {**self._environment, **os.environ, **shared}
            return await Link.start(self._handler, slot.device, slot.log, self._heartbeat_timeout, environment)
        except OSError as error:
            raise WorkerError(
                f"No worker could be started on {slot.device}: {error}. Free memory or processes and try again."
            ) from error

    async def _retire(self, slot: Slot) -> None:
        if slot.link is not None:
            await slot.link.end()
            slot.session = None

    # -- the queue -----------------------------------------------------------------------------------------------------
    async def _acquire(self, session: str) -> Slot:
        if self._closing.is_set():
            raise _closed()
        waiter = _Waiter(session, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._assign()
        try:
            return await waiter.slot
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif waiter.slot.done() and not waiter.slot.cancelled() and waiter.slot.exception() is None:
                self._free(waiter.slot.result())
            raise

    def _free(self, slot: Slot) -> None:
        slot.busy, slot.used = False, asyncio.get_running_loop().time()
        if slot.link is None or not slot.link.alive:
            slot.serves = None
        self._assign()

    def _assign(self) -> None:
        """Give idle workers to waiting tasks: each to the oldest of its session, unless an older one was passed over too often."""
        self._waiting = [waiter for waiter in self._waiting if not waiter.slot.done()]  # without those cancelled meanwhile
        for slot in sorted(self._idle(), key=lambda slot: slot.serves is None):
            allowed = [waiter for waiter in self._waiting if self._may_have(waiter.session, slot)]
            if not allowed:
                continue
            oldest = chosen = allowed[0]
            if oldest.passed_over < _PASSED_OVER_MOST:
                chosen = next((waiter for waiter in allowed if waiter.session == slot.serves), oldest)
            if chosen is not oldest:
                oldest.passed_over += 1
            self._waiting.remove(chosen)
            slot.busy, slot.serves = True, chosen.session
            chosen.slot.set_result(slot)
        if self._look is not None:
            self._look.cancel()
        later = bool(self._waiting and self._idle())
        self._look = asyncio.get_running_loop().call_later(_RESTED, self._assign) if later else None

    def _idle(self) -> list[Slot]:
        return [slot for slot in self._slots if not slot.busy and not slot.gone]

    def _may_have(self, session: str, slot: Slot) -> bool:
        """Whether a task of ``session`` may have an idle worker, perhaps one of another session."""
        if slot.serves in (None, session):
            return True
        serving = Counter(other.serves for other in self._slots if not other.gone)
        better = any(other.serves in (None, session) for other in self._idle())
        rested = asyncio.get_running_loop().time() - slot.used >= _RESTED
        return not better and (not serving[session] or rested or serving[slot.serves] > serving[session] + 1)

    def _add(self, device: str) -> None:
        """One more device, which takes a waiting task at once."""
        self._slots.append(self._slot(device))
        self._assign()

    def _fail_waiting(self, error: WorkerError) -> None:
        for waiter in self._waiting:
            if not waiter.slot.done():
                waiter.slot.set_exception(error)
        self._waiting.clear()


def _closed() -> WorkerError:
    return WorkerError("The worker pool is closed. Start the server again, or make a new pool.", code="pool_closed")
