"""The job runner: takes queued jobs in order of creation, runs the search, and hands requests to it.

What becomes of a job is :mod:`selfpruner.jobs.lifecycle`'s. A server that stops hands its running jobs back to the queue.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Literal

from selfpruner.config import SearchConfig
from selfpruner.errors import ConflictError, SelfprunerError
from selfpruner.jobs.lifecycle import STOP_SECONDS, JobLife, JobResult, RunJob, discard_partial
from selfpruner.models.memory import ENVIRONMENT
from selfpruner.store.store import Store
from selfpruner.store.tables import Job
from selfpruner.workers.base import WorkerPool
from server import logs
from server.settings import ServerSettings

log = logging.getLogger("selfpruner.jobs")

HANDLER = "selfpruner.jobs.handler:ServedSessionHandler"


class Runner:
    """Runs the jobs of one store. ``start`` and ``stop`` once each; the rest in between."""

    def __init__(self, store: Store, settings: ServerSettings, *, run_job: RunJob, pool: WorkerPool) -> None:
        self._store = store
        self._settings = settings
        self._run_job = run_job
        self._pool = pool
        self._running: dict[str, JobLife] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self.stopping = asyncio.Event()

    @property
    def running(self) -> int:
        return len(self._running)

    async def start(self) -> None:
        self._store.requeue_running()
        self._dispatcher = asyncio.create_task(self._dispatch(), name="dispatcher")

    async def stop(self) -> None:
        """Take no more jobs, hand the running ones back to the queue, end the workers. A second call does nothing."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        self._news.set()
        for running in self._running.values():
            running.stop("queued")
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=self._settings.shutdown_seconds)
        if self._dispatcher is not None:
            self._dispatcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._dispatcher
        with suppress(TimeoutError):
            await asyncio.wait_for(self._pool.close(), self._settings.shutdown_seconds / 4)

    # -- requests ------------------------------------------------------------------------------------------------------
    def submitted(self) -> None:
        """There may be a queued job now."""
        self._news.set()

    async def cancel(self, job_id: str) -> None:
        """Cancel a queued or paused job at once, a running one as soon as its search has stopped. The request is stored first, so
        that it survives a crash. Raises ConflictError when the job is finished."""
        self._store.request_cancel(job_id)
        if job_id in self._running:
            await self._leave(job_id, "cancelled")
        else:
            await discard_partial(self._settings.checkpoints / job_id, "cancelled")

    async def pause(self, job_id: str) -> None:
        """Stop a running job; what it found stays, and ``resume`` goes on from there. Raises ConflictError when it does not run."""
        if job_id in self._running:
            await self._leave(job_id, "paused")
        else:
            self._store.transition(job_id, "paused")

    async def resume(self, job_id: str) -> None:
        """Queue a paused job again. Raises ConflictError when it is not paused."""
        if job_id in self._running:
            raise ConflictError(f"Job {job_id} is running; only a paused job can be resumed.")
        self._store.transition(job_id, "queued")
        self.submitted()

    async def _leave(self, job_id: str, to: Literal["cancelled", "paused"]) -> None:
        running = self._running[job_id]
        if running.leave not in (None, to):
            raise ConflictError(f"Job {job_id} is about to be {running.leave}. Ask again in a few seconds.")
        running.stop(to)
        await asyncio.wait({self._tasks[job_id]}, timeout=STOP_SECONDS + 1)
        if running.problem is not None:
            raise running.problem
        status = self._store.job(job_id).status
        if status != to:
            raise ConflictError(f"Job {job_id} was already {status} when it should be {to}.")

    # -- the loop ------------------------------------------------------------------------------------------------------
    async def _dispatch(self) -> None:
        while not self.stopping.is_set():
            self._news.clear()
            try:
                while len(self._running) < self._settings.parallel_jobs and (job := self._store.next_queued()) is not None:
                    # A server that had to stop in the middle of a cancellation handed the job back.
                    if job.cancel_requested:
                        self._store.transition(job.id, "cancelled")
                    else:
                        self._begin(job)
            except Exception as error:  # whatever it was, later jobs must still run
                log.error("no job could be started: %s", error, exc_info=not isinstance(error, SelfprunerError))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), 1)
                continue
            await self._news.wait()

    def _begin(self, job: Job) -> None:
        life = JobLife(self._store, job, self._settings.checkpoints / job.id, _unexpected)
        life.begin(lambda: self._search(job))
        self._running[job.id] = life
        self._tasks[job.id] = asyncio.create_task(self._attend(life), name=f"job {job.id}")

    async def _search(self, job: Job) -> JobResult:
        logs.job_id.set(job.id)
        log.info("running")
        return await self._run_job(
            SearchConfig.model_validate(job.config),
            job_id=job.id,
            pool=self._pool,
            proposer_settings=self._settings.all_proposers,
            recorder=self._store.recorder(job.id),
            cache=self._settings.cache,
            checkpoint_dir=self._settings.checkpoints / job.id,
        )

    async def _attend(self, life: JobLife) -> None:
        logs.job_id.set(life.id)
        try:
            await life.attend(self.stopping)
        finally:
            del self._running[life.id], self._tasks[life.id]
            self._news.set()


def _unexpected(error: Exception) -> str:
    """What a client is told: nothing of the error but where the log has it."""
    reference = f"err_{uuid.uuid4().hex[:12]}"
    log.error("failed unexpectedly, reference %s", reference, exc_info=error)
    return f"Something unexpected went wrong. The server's log has it under reference {reference}."


def default_run_job() -> RunJob:
    """The real search, imported by the first job and in a thread: meanwhile the server answers."""

    async def run(*args: object, **kwargs: object) -> JobResult:
        job = await asyncio.to_thread(import_module, "selfpruner.jobs.run")
        result: JobResult = await job.run_job(*args, **kwargs)
        return result

    return run


def default_pool(settings: ServerSettings) -> WorkerPool:
    from selfpruner.workers.process_pool import ProcessPool

    roots = {"SELFPRUNER_MODEL_ROOT": settings.model_root, "SELFPRUNER_TEXT_ROOT": settings.text_root}
    limits = {variable: str(root) for variable, root in roots.items() if root is not None}
    if settings.ray is None:
        os.environ.update(limits)  # workers inherit the limit, wherever it was set
        return ProcessPool(settings.devices, handler=HANDLER, log_dir=settings.logs)
    from selfpruner.workers.ray_pool import RayPool

    return RayPool(
        settings.ray,
        devices=settings.devices,
        memory=settings.ray_memory,
        # The same server finds its workers again, another one does not take them.
        name=f"selfpruner-{hashlib.sha256(str(settings.home).encode()).hexdigest()[:8]}",
        handler=HANDLER,
        environment={**ENVIRONMENT, **limits},
    )


PoolFactory = Callable[[ServerSettings], WorkerPool]
