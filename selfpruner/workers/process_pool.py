"""A pool of worker processes, one per device.

A worker starts with the first task that needs it and stays warm. When it dies or freezes, it is replaced and its task runs again,
at most ``max_attempts`` times; a result that arrived before the death counts. Tasks wait in a queue when all workers are busy. A
worker that already holds a session is preferred for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from selfpruner.errors import ConfigError, WorkerError, from_dict
from selfpruner.models.memory import ENVIRONMENT
from selfpruner.progress import Foreseen, OnProgress
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import R, TaskRequest
from selfpruner.workers.worker_process import Connection, Link, Message

CANCEL_GRACE = 3.0  # seconds a cancelled task gets before its worker is killed
_BACKOFF_FIRST, _BACKOFF_MOST = 0.1, 5.0  # seconds before a worker that died twice in a row starts again
_PASSED_OVER_MOST = 8  # times a waiting task may see tasks of a worker's own session go first


class DeviceGoneError(Exception):
    """The device has left, as a node of a cluster does; its task is another worker's."""


@dataclass(slots=True, eq=False)
class Slot:
    """One device and the worker on it, if one was started. ``task`` is the number of the task it was sent and has not answered;
    ``gone``: the device has left."""

    device: str
    log: Path
    link: Connection | None = None
    gone: bool = False
    session: str | None = None
    busy: bool = False
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
        devices: one worker is made for each, with this name as its device ("cpu", "cuda:0").
        runtime: ``module:Class`` of the TaskHandler; imported in the worker only.
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
        runtime: str = "selfpruner.jobs.handler:SessionHandler",
        log_dir: Path | None = None,
        max_attempts: int = 3,
        task_timeout: float | None = None,
        heartbeat_timeout: float = 60.0,
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> None:
        if not devices:
            raise ConfigError("A worker pool needs at least one device.", param="devices")
        self._runtime = runtime
        self._max_attempts = max_attempts
        self._task_timeout = task_timeout
        self._heartbeat_timeout = heartbeat_timeout
        self._environment = environment
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
            return await Link.start(self._runtime, slot.device, slot.log, self._heartbeat_timeout, self._environment)
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
        idle = [slot for slot in self._slots if not slot.busy and not slot.gone]
        if idle:
            # The session's own worker; else one that holds no session; else any: `min` keeps the first.
            slot = min(idle, key=lambda s: (s.session != session, s.session is not None))
            slot.busy = True
            return slot
        waiter = _Waiter(session, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            return await waiter.slot
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif waiter.slot.done() and not waiter.slot.cancelled() and waiter.slot.exception() is None:
                self._free(waiter.slot.result())
            raise

    def _free(self, slot: Slot) -> None:
        """Hand the slot to a waiting task: the oldest of its session, unless an older one was passed over too often."""
        self._waiting = [waiter for waiter in self._waiting if not waiter.slot.done()]  # without those cancelled meanwhile
        if not self._waiting or slot.gone:
            slot.busy = False
            return
        oldest = self._waiting[0]
        chosen = oldest
        if oldest.passed_over < _PASSED_OVER_MOST:
            chosen = next((w for w in self._waiting if w.session == slot.session), oldest)
        if chosen is not oldest:
            oldest.passed_over += 1
        self._waiting.remove(chosen)
        chosen.slot.set_result(slot)

    def _add(self, device: str) -> None:
        """One more device, which takes a waiting task at once."""
        slot = self._slot(device)
        slot.busy = True
        self._slots.append(slot)
        self._free(slot)

    def _fail_waiting(self, error: WorkerError) -> None:
        for waiter in self._waiting:
            if not waiter.slot.done():
                waiter.slot.set_exception(error)
        self._waiting.clear()


def _closed() -> WorkerError:
    return WorkerError("The worker pool is closed. Start the server again, or make a new pool.", code="pool_closed")
