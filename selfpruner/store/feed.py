"""A job as it is watched: what happened, in order, and how far it is. The one source of event streams, live views and callbacks."""

from __future__ import annotations

from selfpruner.store.objects import EventObject, JobObject, event_object, job_object
from selfpruner.store.store import Store

PAGE = 100


class Feed:
    """Every event of a job once, in order, those after number ``after``; and the job, whenever its status or progress changed.

    ``more``: the last look did not see everything there was. ``ended``: the job has finished, and all of it was seen.
    """

    def __init__(self, store: Store, job_id: str, after: int = 0) -> None:
        self.more = self.ended = False
        self._store = store
        self._job_id = job_id
        self._after = after
        self._seen: tuple[object, ...] | None = None

    def look(self) -> list[EventObject | JobObject]:
        """What is new since the last look, at most ``PAGE`` events and then the job. Reads the database."""
        # The job before its events: when it is finished here, its last event is already there.
        job = self._store.job(self._job_id)
        page = self._store.events(self._job_id, self._after, PAGE)
        news: list[EventObject | JobObject] = [event_object(event) for event in page.data]
        if page.data:
            self._after = page.data[-1].sequence
        if not page.has_more and (job.status, job.progress) != self._seen:
            self._seen = (job.status, job.progress)
            news.append(job_object(job))
        self.more, self.ended = page.has_more, job.finished and not page.has_more
        return news


def named(news: EventObject | JobObject) -> str:
    """What a stream calls it: an event by its type, the job ``job``."""
    return news["type"] if news["object"] == "event" else news["object"]
