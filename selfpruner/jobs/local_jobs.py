"""The jobs of a folder of searches, with the same questions as a server's: see :class:`selfpruner.client.Client`. Imports no torch.

Reading does not disturb a search that is running there; ``cancel`` is refused meanwhile, because only one process writes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Self, TypeVar, cast, get_args

from selfpruner.errors import ConflictError, NotFoundError, UnknownNameError
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
from selfpruner.store.tables import CandidateRow, Event

LOOK_SECONDS = 0.5

Row = TypeVar("Row", CandidateRow, Event)


class LocalJobs:
    """``source`` is the folder or the database of searches. A context manager."""

    def __init__(self, source: Path) -> None:
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
        """The job, if a search may go on with it. Raises ConflictError for one that has finished, or is a server's."""
        job = self._store.job(job_id)
        runs.checkpoint_folder(self.folder, job)
        if job.finished:
            raise ConflictError(f"Job {job_id} is {job.status}; only one that has not finished can be resumed.")
        return job_object(job)

    def newest(self) -> str:
        """The id of the newest job. Raises NotFoundError where there is none yet."""
        found = self._store.jobs(limit=1).data
        if not found:
            raise NotFoundError(f"{self._database} holds no job yet.", param="source")
        return found[0].id

    def get(self, job_id: str) -> JobObject:
        return job_object(self._store.job(job_id))

    def list(self, after: str | None = None, limit: int = 20, status: str | None = None) -> ListObject[JobObject]:
        if status is not None and status not in get_args(JobStatus):
            raise UnknownNameError("status", status, get_args(JobStatus))
        page = self._store.jobs(after, limit, status=cast(JobStatus | None, status))
        return list_object([job_object(job) for job in page.data], page.has_more)

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
        """Until the job runs no more: where it waits, only a call of `search` goes on with it."""
        feed = Feed(self._store, job_id, after)
        while True:
            for each in feed.look():
                yield named(each), each
            if feed.more:
                continue
            if self._store.job(job_id).status != "running":
                return
            time.sleep(LOOK_SECONDS)

    def cancel(self, job_id: str) -> JobObject:
        """Cancel a job that waits. Raises ConflictError for one that has finished, or is a server's, StoreError while a search runs
        there."""
        checkpoint = runs.checkpoint_folder(self.folder, self._store.job(job_id))
        with Store(self._database) as store:
            store.requeue_running()
            job = store.request_cancel(job_id)
        shutil.rmtree(checkpoint, ignore_errors=True)
        return job_object(job)


def _pages(ask: Callable[[Row | None], Page[Row]]) -> Iterator[Row]:
    """All rows, page after page; ``ask`` is given the last row of the page before."""
    last = None
    while True:
        page = ask(last)
        yield from page.data
        if not page.has_more:
            return
        last = page.data[-1]
