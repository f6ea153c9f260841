"""One write transaction: its session, its time, and what may only be done inside it.

Moving a job and appending an event both read before they write. They are safe because the transaction began as IMMEDIATE:
nobody else writes between the two.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import func
from sqlmodel import Session, col, select

from selfpruner.errors import ConflictError, NotFoundError, StoreError
from selfpruner.records import JobError, JobStatus, Severity
from selfpruner.store.tables import TRANSITIONS, Event, Job


class Transaction:
    """``now`` is in UTC unix seconds; ``appended`` collects (job id, sequence) of new events, ``progressed`` the
    jobs that told how far they are; both are told after the commit."""

    def __init__(self, session: Session, now: int) -> None:
        self.session = session
        self.now = now
        self.appended: list[tuple[str, int]] = []
        self.progressed: list[str] = []

    def job(self, job_id: str, owner: str | None = None) -> Job:
        return find_job(self.session, job_id, owner)

    def move(self, job: Job, to: JobStatus, error: JobError | None = None) -> Job:
        """See ``Store.transition``."""
        status = job.status
        if to not in TRANSITIONS[status]:
            onward = ", ".join(TRANSITIONS[status])
            hint = f"From there it can become: {onward}." if onward else "It has finished; submit a new job instead."
            raise ConflictError(f"Job {job.id} is {status} and cannot become {to}. {hint}", code=f"job_{status}")
        if job.cancel_requested and to in ("queued", "paused"):
            to = "cancelled"
        if (to == "failed") != (error is not None):
            raise StoreError(f"Job {job.id} cannot become {to}: an error belongs to a failed job and to no other.")
        job.status = to
        if to == "running" and job.started_at is None:
            job.started_at = self.now
        if not TRANSITIONS[to]:
            job.finished_at = self.now
        if error is not None:
            job.error = error.copy()
        self.announce(job)
        return job

    def announce(self, job: Job) -> None:
        """Append the event that tells the job's status; a job may come to the same status again, so each is new."""
        number = self._next_sequence(job.id)
        if job.error is not None:
            self.event(job.id, f"status/{number}", "job.failed", job.error["message"], level="error", data=job.error)
        else:
            self.event(job.id, f"status/{number}", f"job.{job.status}", f"Job {job.status}.")

    def event(
        self, job_id: str, key: str, type: str, message: str, *, level: Severity = "info", data: Mapping[str, object] | None = None
    ) -> None:
        """Append an event under the job's next sequence number, unless ``key`` was used before."""
        if self.session.exec(select(Event.sequence).where(Event.job_id == job_id, Event.key == key)).first() is not None:
            return
        sequence = self._next_sequence(job_id)
        self.session.add(
            Event(
                job_id=job_id,
                sequence=sequence,
                created_at=self.now,
                level=level,
                type=type,
                message=storable(message),
                data=dict(data or {}),
                key=key,
            )
        )
        self.appended.append((job_id, sequence))

    def _next_sequence(self, job_id: str) -> int:
        last = self.session.exec(select(func.max(col(Event.sequence))).where(Event.job_id == job_id)).one()
        return (last or 0) + 1


def find_job(session: Session, job_id: str, owner: str | None = None, *, param: str | None = None) -> Job:
    """The job, also where only ``owner``'s count; NotFoundError with ``param`` otherwise."""
    job = session.exec(select(Job).where(Job.id == job_id)).first()
    if job is None or (owner is not None and job.owner != owner):
        query = select(Job.id).order_by(col(Job.number).desc()).limit(3)
        newest = session.exec(query if owner is None else query.where(Job.owner == owner)).all()
        known = f"The newest: {', '.join(newest)}. " if newest else "There is none yet. "
        raise NotFoundError(f"No job {job_id!r} here. {known}`selfpruner jobs` lists those of a server.", param=param)
    return job


def storable(text: str) -> str:
    """SQLite's text is UTF-8: half a surrogate pair, as a broken LLM reply may have it, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()
