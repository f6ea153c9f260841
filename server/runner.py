"""The job runner: takes queued jobs in order of creation, runs the search, and writes what became of it.

    queued -> running -> succeeded          the search returned
                      -> failed             it raised; the error is stored typed, a traceback only in the log
                      -> cancelled, paused  on request
                      -> queued             the server stops; the next one goes on by replay

Everything here happens on the event loop, so a request for a change and the end of a job cannot overlap: whoever comes first
decides, the other sees the new state. A running job is left only after its search has stopped, or after ``STOP_SECONDS``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from selfpruner.config import SearchConfig
from selfpruner.errors import ConflictError, SelfprunerError
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.records import Recorder
from selfpruner.store.store import Store
from selfpruner.store.tables import Job, JobStatus
from selfpruner.workers.base import WorkerPool
from server import logs
from server.settings import ServerSettings

log = logging.getLogger("selfpruner.jobs")

# A cancelled job is `cancelled` within five seconds, whatever its search is doing.
STOP_SECONDS = 4.5

# What the database keeps of a search's checkpoint; timings and the like are in its report.
CHECKPOINT_FIELDS = ("path", "plan_hash", "parameters", "bytes", "manifest_sha256", "verification", "metrics")

Left = Literal["cancelled", "paused", "queued"]


class JobResult(Protocol):
    """What a search returns; see :class:`selfpruner.jobs.run.JobResult`."""

    @property
    def report(self) -> dict[str, Any]: ...
    @property
    def checkpoint(self) -> dict[str, Any]: ...


class RunJob(Protocol):
    """The search as the runner sees it; see :func:`selfpruner.jobs.run.run_job`."""

    async def __call__(
        self,
        config: SearchConfig,
        *,
        job_id: str,
        pool: WorkerPool,
        proposer_settings: Mapping[str, ProposerSettings],
        recorder: Recorder,
        cache: Path,
        checkpoint_dir: Path,
    ) -> JobResult: ...


@dataclass(eq=False)
class _Running:
    """A job that runs. ``leave`` is where it shall go when its search was stopped on request; ``problem`` is why that cannot be
    written at the moment."""

    search: asyncio.Task[JobResult]
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    leave: Left | None = None
    problem: SelfprunerError | None = None

    def stop(self, leave: Left) -> None:
        self.leave = leave
        self.stopping.set()
        self.search.cancel()


class Runner:
    """Runs the jobs of one store. ``start`` and ``stop`` once each; the rest in between."""

    def __init__(self, store: Store, settings: ServerSettings, *, run_job: RunJob, pool: WorkerPool) -> None:
        self._store = store
        self._settings = settings
        self._run_job = run_job
        self._pool = pool
        self._running: dict[str, _Running] = {}
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
            if running.leave is None:
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
            await self._discard_partial(job_id, "cancelled")

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
        if running.leave is None and not running.search.done():
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
                    self._store.transition(job.id, "cancelled" if job.cancel_requested else "running")
                    if not job.cancel_requested:
                        self._begin(job)
            except Exception as error:  # whatever it was, later jobs must still run
                log.error("no job could be started: %s", error, exc_info=not isinstance(error, SelfprunerError))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), 1)
                continue
            await self._news.wait()

    def _begin(self, job: Job) -> None:
        search = asyncio.create_task(self._search(job), name=f"search {job.id}")
        self._running[job.id] = running = _Running(search)
        self._tasks[job.id] = asyncio.create_task(self._attend(job.id, running), name=f"job {job.id}")

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

    async def _attend(self, job_id: str, running: _Running) -> None:
        """Wait for the end of the search, or for a request to stop it, and write what became of the job."""
        logs.job_id.set(job_id)
        stop = asyncio.create_task(running.stopping.wait())
        try:
            await asyncio.wait({running.search, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not running.search.done():
                await asyncio.wait({running.search}, timeout=STOP_SECONDS)
            if running.search.done():
                to, error = self._outcome(job_id, running)
            else:
                log.error("the search did not stop within %.1f s; its job is left as %s", STOP_SECONDS, running.leave)
                to, error = running.leave or "queued", None
            await self._write(job_id, running, to, error)
            await self._discard_partial(job_id, to)
        finally:
            stop.cancel()
            del self._running[job_id], self._tasks[job_id]
            self._news.set()

    def _outcome(self, job_id: str, running: _Running) -> tuple[JobStatus, dict[str, Any] | None]:
        """Where the job goes after its search has ended; its result is stored here."""
        try:
            result = running.search.result()
            self._store.add_checkpoint(job_id, **{name: result.checkpoint[name] for name in CHECKPOINT_FIELDS})
            self._store.set_result(job_id, result.report)
        except asyncio.CancelledError:
            if running.leave is not None:
                return running.leave, None
            message = "The search stopped itself without a result. This is a bug; the server's log may say more."
            return "failed", {"code": "internal_error", "message": message, "param": None}
        except SelfprunerError as error:
            # What a search raises while it is being stopped is a consequence of that, not the job's own failure.
            if running.leave is not None:
                return running.leave, None
            log.warning("failed: %s (%s)", error, error.code)
            return "failed", {"code": error.code, "message": error.message, "param": error.param}
        except Exception:
            reference = f"err_{uuid.uuid4().hex[:12]}"
            log.exception("failed unexpectedly, reference %s", reference)
            if running.leave is not None:
                return running.leave, None
            message = f"Something unexpected went wrong. The server's log has it under reference {reference}."
            return "failed", {"code": "internal_error", "message": message, "param": None}
        return "succeeded", None

    async def _write(self, job_id: str, running: _Running, to: JobStatus, error: dict[str, Any] | None) -> None:
        """Make the transition durable. While the disk is full this is tried again; after a restart the job is simply run again."""
        delay = 0.5
        while True:
            try:
                self._store.transition(job_id, to, error=error)
            except ConflictError as conflict:
                log.error("left as it is: %s", conflict)
            except SelfprunerError as problem:
                running.problem = problem
                log.error("cannot be marked %s: %s", to, problem)
                if not self.stopping.is_set():
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, 10.0)
                    continue
            else:
                running.problem = None
                log.info("%s", to)
            return

    async def _discard_partial(self, job_id: str, to: str) -> None:
        """A job that ended without success leaves no checkpoint folder behind."""
        if to in ("failed", "cancelled"):
            await asyncio.to_thread(shutil.rmtree, self._settings.checkpoints / job_id, ignore_errors=True)


def default_run_job() -> RunJob:
    """The real search, imported by the first job and in a thread: meanwhile the server answers."""

    async def run(*args: Any, **kwargs: Any) -> JobResult:
        job = await asyncio.to_thread(import_module, "selfpruner.jobs.run")
        result: JobResult = await job.run_job(*args, **kwargs)
        return result

    return run


def default_pool(settings: ServerSettings) -> WorkerPool:
    from selfpruner.workers.process_pool import ProcessPool

    for variable, root in (("SELFPRUNER_MODEL_ROOT", settings.model_root), ("SELFPRUNER_TEXT_ROOT", settings.text_root)):
        if root is not None:
            os.environ[variable] = str(root)  # workers inherit the limit, wherever it was set
    return ProcessPool(settings.devices, runtime="selfpruner.jobs.handler:ServedSessionHandler", log_dir=settings.logs)


PoolFactory = Callable[[ServerSettings], WorkerPool]
