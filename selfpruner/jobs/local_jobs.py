"""The jobs of a folder of searches, with the same questions as a server's: see :class:`selfpruner.client.Client`. Imports no torch.

Reading does not disturb a search that is running there; ``cancel`` is refused meanwhile, because only one process writes. A job
that is running in the database although no process writes it is shown as ``interrupted``: its process was killed, and ``resume``
goes on with it.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Self, TypeVar, cast, get_args

from selfpruner.errors import ConfigError, ConflictError, NotFoundError, UnknownNameError
from selfpruner.jobs import runs
from selfpruner.records import JobStatus
from selfpruner.store.feed import Feed, named
from selfpruner.store.objects import (
    CandidateObject,
    CheckpointObject,
    EventObject,
    JobObject,
    ListObject,
    candidate_object,
    checkpoint_object,
    event_object,
    job_object,
    list_object,
)
from selfpruner.store.store import Page, Store
from selfpruner.store.tables import CandidateRow, Event, Job

LOOK_SECONDS = 0.5
INTERRUPTED = "interrupted"

Row = TypeVar("Row", CandidateRow, Event)


class LocalJobs:
    """``source`` is the folder or the database of searches. A context manager."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._database = runs.database(source)
        self._store = runs.reading(self._database)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    @property
    def folder(self) -> Path:
        return self._database.parent

    def waiting(self, job_id: str) -> JobObject:
        """The job, if a search may go on with it. Raises ConflictError for one that has finished, or is a server's, and ConfigError
        for a database in which no search goes on."""
        job = self._store.job(job_id)
        self._place(job)
        if job.finished:
            raise ConflictError(f"Job {job_id} is {job.status}; only one that has not finished can be resumed.")
        return job_object(job)

    def newest(self, *, waiting: bool = False) -> str:
        """The id of the newest job; where ``waiting``, of the newest that has not finished, if there is one. Raises NotFoundError
        where there is none yet."""
        jobs = self._store.jobs(limit=runs.ALL if waiting else 1).data
        if not jobs:
            raise NotFoundError(f"{self._database} holds no job yet.", param="source")
        return next((job for job in jobs if waiting and not job.finished), jobs[0]).id

    def command(self, name: str, job_id: str) -> str:
        """The command line that does something with a job here."""
        return shlex.join(["selfpruner", *name.split(), str(self._source), "--job", job_id])

    def get(self, job_id: str) -> JobObject:
        return self._shown(self._store.job(job_id))

    def list(self, after: str | None = None, limit: int = 20, status: str | None = None) -> ListObject[JobObject]:
        known = (*get_args(JobStatus), INTERRUPTED)
        if status is not None and status not in known:
            raise UnknownNameError("status", status, known)
        if status in ("running", INTERRUPTED):
            if (status == "running") != self._store.is_written():
                return list_object([])
            status = "running"
        page = self._store.jobs(after, limit, status=cast(JobStatus | None, status))
        return list_object([self._shown(job) for job in page.data], page.has_more)

    def candidates(self, job_id: str, order: Literal["generation", "fitness"] = "generation") -> Iterator[CandidateObject]:
        for row in _pages(lambda last: self._store.candidates(job_id, None if last is None else last.plan_hash, order=order)):
            yield candidate_object(row)

    def checkpoints(self, job_id: str) -> Iterator[CheckpointObject]:
        for row in self._store.checkpoints(job_id):
            yield checkpoint_object(row)

    def events(self, job_id: str, after: int = 0) -> Iterator[EventObject]:
        for row in _pages(lambda last: self._store.events(job_id, last.sequence if last else after)):
            yield event_object(row)

    def follow(self, job_id: str, after: int = 0) -> Iterator[tuple[str, EventObject | JobObject]]:
        """Until the job runs no more: it has finished, or waits until `search` or `resume` goes on with it, or was interrupted, and
        then the last message is the job with that status."""
        feed = Feed(self._store, job_id, after)
        while True:
            for each in feed.look():
                yield named(each), each
            if feed.more:
                continue
            written = self._store.is_written()  # before its status: a process says what became of the job and then lets go
            status = self._store.job(job_id).status
            if status == "running" and written:
                time.sleep(LOOK_SECONDS)
                continue
            for each in feed.look():  # what came after the look above
                yield named(each), each
            if not feed.more:
                if status == "running":
                    yield "job", self.get(job_id)
                return

    def cancel(self, job_id: str) -> JobObject:
        """Cancel a job that waits. Raises ConflictError for one that has finished, or is a server's, StoreError while a search runs
        there."""
        checkpoint = self._place(self._store.job(job_id))
        with Store(self._database) as store:
            store.requeue_running()
            job = store.request_cancel(job_id)
        shutil.rmtree(checkpoint, ignore_errors=True)
        return job_object(job)

    def _place(self, job: Job) -> Path:
        """Where the checkpoint of a job is that may be changed here."""
        if self._database.name != runs.DATABASE:
            raise ConfigError(
                f"A search goes on in {self.folder / runs.DATABASE}, and {self._source} is another database: it is only read.",
                param="source",
            )
        return runs.checkpoint_folder(self.folder, job)

    def _shown(self, job: Job) -> JobObject:
        shown = job_object(job)
        if job.status == "running" and not self._store.is_written():
            shown["status"] = cast(JobStatus, INTERRUPTED)  # which no database and no server says
        return shown


def _pages(ask: Callable[[Row | None], Page[Row]]) -> Iterator[Row]:
    """All rows, page after page; ``ask`` is given the last row of the page before."""
    last = None
    while True:
        page = ask(last)
        yield from page.data
        if not page.has_more:
            return
        last = page.data[-1]
