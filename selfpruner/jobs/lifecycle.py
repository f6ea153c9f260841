"""One life of a job, whoever started it: a server, the command line, Python.

    queued -> running -> succeeded          the search returned; its checkpoint and its report are stored before
                      -> failed             it raised; the error is stored typed
                      -> cancelled, paused  on request
                      -> queued             whoever ran it stops (a server, Ctrl-C, SIGTERM); the next one goes on by replay

Everything happens on one event loop, so a request for a change and the end of a job cannot overlap: the first one decides, and the
other sees the new state. A running job is left only after its search has stopped, or after ``STOP_SECONDS``. Imports neither torch
nor the search.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from selfpruner.config import SearchConfig
from selfpruner.errors import ConflictError, SelfprunerError
from selfpruner.files.report import Report
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.records import CheckpointFacts, JobError, JobStatus, Recorder
from selfpruner.store.store import Store
from selfpruner.store.tables import Job
from selfpruner.workers.base import WorkerPool

log = logging.getLogger("selfpruner.jobs")
log.addHandler(logging.NullHandler())  # a search in this process raises what went wrong, and its log is the caller's to ask for

# A cancelled job is `cancelled` within five seconds, whatever its search is doing.
STOP_SECONDS = 4.5

Left = Literal["cancelled", "paused", "queued"]


class MadeCheckpoint(CheckpointFacts, total=False):
    """The checkpoint of a search, and how it was made where that was now. ``reused``: its files were there already."""

    write_seconds: float
    verify_seconds: float
    reused: bool


@dataclass(frozen=True, slots=True)
class JobResult:
    """``reused``: all of it was there already."""

    report: Report
    checkpoint: MadeCheckpoint
    reused: bool = False


class RunJob(Protocol):
    """:func:`selfpruner.jobs.run.run_job`, or what stands in for it."""

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


class JobLife:
    """A job from its start to the state it is left in: ``begin``, then ``attend`` once. ``stop`` may come at any time between.

    ``partial`` is the folder that a job without success leaves nothing in. ``explain`` gives the stored message of an error that is
    none of ours. ``leave`` is where the job shall go when its search was stopped on request; ``problem`` is why that cannot be
    written at the moment; ``error`` is what ended the search.
    """

    def __init__(self, store: Store, job: Job, partial: Path, explain: Callable[[Exception], str] = str) -> None:
        self.id = job.id
        self.leave: Left | None = None
        self.problem: SelfprunerError | None = None
        self.error: BaseException | None = None
        self._store = store
        self._job = job
        self._partial = partial
        self._explain = explain
        # A checkpoint that was lost is made again from what was computed; the job stays what it was.
        self._again = job.finished
        self._search: asyncio.Task[JobResult] | None = None
        self._stopping = asyncio.Event()

    def begin(self, search: Callable[[], Coroutine[object, None, JobResult]]) -> None:
        """Mark the job running and start its search. Raises ConflictError for one that may not run."""
        if not self._again:
            if self._job.status == "paused":
                self._store.transition(self.id, "queued")
            self._store.transition(self.id, "running")
        self._search = asyncio.create_task(search(), name=f"search {self.id}")

    def stop(self, leave: Left) -> None:
        """Stop the search and leave the job as ``leave``, unless it has ended or is being stopped already."""
        assert self._search is not None
        if self.leave is None and not self._search.done():
            self.leave = leave
            self._stopping.set()
            self._search.cancel()

    async def attend(self, closing: asyncio.Event | None = None) -> None:
        """Wait for the end of the search, or for a request to stop it, and write what became of the job.

        A state that cannot be written, on a full disk say, is tried again until ``closing``; without one it is not. Being
        cancelled stops the search, and the job is queued again before CancelledError goes on.
        """
        assert self._search is not None
        stop = asyncio.create_task(self._stopping.wait())
        cancelled: asyncio.CancelledError | None = None
        try:
            await asyncio.wait({self._search, stop}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError as error:
            cancelled = error
            self.stop("queued")
        finally:
            stop.cancel()
        if not self._search.done():
            await asyncio.wait({self._search}, timeout=STOP_SECONDS)
        if self._search.done():
            to, failure = self._outcome(self._search)
        else:
            log.error("the search did not stop within %.1f s; its job is left as %s", STOP_SECONDS, self.leave)
            to, failure = self.leave or "queued", None
        await self._write(to, failure, closing)
        if not self._again:
            await discard_partial(self._partial, to)
        if cancelled is not None:
            raise cancelled

    def result(self) -> JobResult:
        """What the search returned, once ``attend`` has ended. Raises what ended it instead, and what could not be stored."""
        assert self._search is not None
        if self.error is not None:
            raise self.error
        if self.problem is not None:
            raise self.problem
        return self._search.result()

    def _outcome(self, search: asyncio.Task[JobResult]) -> tuple[JobStatus, JobError | None]:
        """Where the job goes after its search has ended; its result is stored here."""
        try:
            result = search.result()
            self._store.add_checkpoint(self.id, result.checkpoint)
            self._store.set_result(self.id, result.report)
        except Exception as error:
            self.error = error
            # What a search raises while it is being stopped is a consequence of that, not the job's own failure.
            if self.leave is None:
                return "failed", self._failure(error)
            if not isinstance(error, SelfprunerError):
                self._explain(error)
            return self.leave, None
        except BaseException as error:  # cancelled, or Ctrl-C in the middle of the search
            self.error = error
            if self.leave is None and isinstance(error, asyncio.CancelledError):
                message = "The search stopped itself without a result. This is a bug; the server's log may say more."
                return "failed", {"code": "internal_error", "message": message, "param": None}
            return self.leave or "queued", None
        return "succeeded", None

    def _failure(self, error: Exception) -> JobError:
        if isinstance(error, SelfprunerError):
            log.warning("failed: %s (%s)", error, error.code)
            return {"code": error.code, "message": error.message, "param": error.param}
        return {"code": "internal_error", "message": self._explain(error), "param": None}

    async def _write(self, to: JobStatus, failure: JobError | None, closing: asyncio.Event | None) -> None:
        """Make the transition durable. While the disk is full this is tried again; after a restart the job is simply run again."""
        if self._again:
            return
        delay = 0.5
        while True:
            try:
                self._store.transition(self.id, to, error=failure)
            except ConflictError as conflict:
                log.error("left as it is: %s", conflict)
            except SelfprunerError as problem:
                self.problem = problem
                log.error("cannot be marked %s: %s", to, problem)
                if closing is not None and not closing.is_set():
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, 10.0)
                    continue
            else:
                self.problem = None
                log.info("%s", to)
            return


async def discard_partial(folder: Path, to: str) -> None:
    """A job that ended without success leaves no checkpoint behind."""
    if to in ("failed", "cancelled"):
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
