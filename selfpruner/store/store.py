"""The store: every read and write of the database, in short transactions.

What a caller may rely on
- A write has reached the disk when the call returns; a write that raises has changed nothing.
- A job moves only along ``tables.TRANSITIONS`` and reaches exactly one terminal state, whoever races.
- Another owner's job is not found, just like one that does not exist.
- Rows are plain values: they stay usable after the store is closed, and changing one changes nothing.

Only the process that opened the store without ``read_only`` writes (see :mod:`selfpruner.store.database`). Threads may share it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Self, TypeVar

import sqlalchemy
from sqlalchemy import ColumnElement, Select, SQLColumnExpression, func, insert, inspect, literal, literal_column, or_, true, tuple_
from sqlmodel import col, delete, select

from selfpruner.config import SearchConfig
from selfpruner.errors import AmbiguousNameError, ConfigError, ConflictError, NotFoundError
from selfpruner.files.report import Report
from selfpruner.records import CheckpointFacts, JobError, JobStatus, StoredConfig
from selfpruner.store import schema
from selfpruner.store.database import Database
from selfpruner.store.recorder import JobRecorder
from selfpruner.store.tables import (
    CandidateRow,
    Checkpoint,
    EvaluationRow,
    Event,
    Idempotency,
    Job,
    LlmCallRow,
    StageRow,
)
from selfpruner.store.transaction import Transaction, find_job

IDEMPOTENCY_SECONDS = 24 * 3600
# Plans that a message about an ambiguous beginning names.
SHOWN = 5
ROWID: ColumnElement[int] = literal_column("rowid")
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """A part of a list; ``has_more`` when rows follow the last one."""

    data: tuple[Row, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Totals:
    """What a job's LLM calls used, failed ones included."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost: float

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Store:
    """The database at ``path``, made or migrated as needed; a context manager.

    ``on_event`` is called with (job id, event sequence) after the event is committed, in the thread that wrote it; ``on_progress``
    with the id of a job after its progress was.
    ``clock`` gives UTC unix seconds. Every method may raise StoreError, and a writing one DiskFullError.
    """

    def __init__(self, path: Path | str, *, read_only: bool = False, clock: Callable[[], float] = time.time) -> None:
        self.on_event: Callable[[str, int], None] | None = None
        self.on_progress: Callable[[str], None] | None = None
        self._clock = clock
        self._database = Database(path, read_only=read_only)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    @property
    def path(self) -> Path:
        return self._database.path

    def is_written(self) -> bool:
        """Whether a process has the database open for writing: without one, a job that is ``running`` was interrupted."""
        return self._database.is_written()

    # Jobs

    def create_job(
        self,
        config: SearchConfig,
        *,
        metadata: Mapping[str, str] | None = None,
        checkpoint_number: int | None = None,
        owner: str = "local",
        idempotency_key: str | None = None,
        body_hash: str | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job; returns it and whether it is new. ``checkpoint_number`` is for a search in this process, see ``Job``.

        With an ``idempotency_key`` that this owner used in the last 24 hours the first job is returned, or ConflictError is
        raised when that request had another ``body_hash`` (default: a hash of config and metadata).
        """
        body: StoredConfig = json.loads(config.model_dump_json())
        labels = dict(metadata or {})
        body_hash = body_hash or hashlib.sha256(json.dumps([body, labels], sort_keys=True).encode()).hexdigest()
        with self._transaction() as write:
            now = write.now
            if idempotency_key is not None:
                write.session.exec(delete(Idempotency).where(col(Idempotency.created_at) <= now - IDEMPOTENCY_SECONDS))
                known = write.session.get(Idempotency, (owner, idempotency_key))
                if known is not None:
                    if known.body_hash != body_hash:
                        raise ConflictError(
                            f"Idempotency-Key {idempotency_key!r} was used with another request less than 24 hours ago. Send the "
                            "same request, or a new key.",
                            code="idempotency_conflict",
                            param="Idempotency-Key",
                        )
                    return write.job(known.job_id), False
            job = Job(
                id=new_id("job"),
                owner=owner,
                created_at=now,
                config=body,
                user_metadata=labels,
                checkpoint_number=checkpoint_number,
            )
            write.session.add(job)
            write.session.flush()
            if idempotency_key is not None:
                write.session.add(Idempotency(owner=owner, key=idempotency_key, body_hash=body_hash, job_id=job.id, created_at=now))
            write.announce(job)
            return job, True

    def take_over(self, job_id: str, failed_id: str) -> None:
        """Give a new job what another one with the same config computed before it failed, scores and LLM replies, with what that
        took and what it began with. A plan that could not be scored is tried again."""
        with self._transaction() as write:
            scored = or_(col(EvaluationRow.kl).is_not(None), col(EvaluationRow.nll).is_not(None))
            for table, wanted in ((EvaluationRow, scored), (LlmCallRow, true()), (StageRow, true())):
                columns = [column for column in inspect(table).columns if column.key != "job_id"]
                rows: Select[object] = sqlalchemy.select(literal(job_id), *columns).where(col(table.job_id) == failed_id, wanted)
                write.session.execute(insert(table).from_select(["job_id", *(column.key for column in columns)], rows))
            began = write.session.exec(select(Event).where(Event.job_id == failed_id, Event.key == "prepared")).first()
            if began is not None:
                write.event(job_id, began.key, began.type, began.message, data=began.data)

    def job(self, job_id: str, *, owner: str | None = None) -> Job:
        """The job; NotFoundError when there is none, or it is not ``owner``'s."""
        with self._database.reading() as session:
            return find_job(session, job_id, owner)

    def jobs(
        self, after: str | None = None, limit: int = 20, *, owner: str | None = None, status: JobStatus | None = None
    ) -> Page[Job]:
        """Jobs, newest first, those created before job ``after``. NotFoundError when ``after`` is no job of ``owner``."""
        query = select(Job).order_by(col(Job.number).desc())
        if owner is not None:
            query = query.where(Job.owner == owner)
        if status is not None:
            query = query.where(Job.status == status)
        with self._database.reading() as session:
            if after is not None:
                query = query.where(col(Job.number) < find_job(session, after, owner, param="after").number)
            return _page(session.exec(query.limit(_bound(limit) + 1)).all(), limit)

    def next_queued(self) -> Job | None:
        """The job that waits longest, or None."""
        with self._database.reading() as session:
            return session.exec(select(Job).where(Job.status == "queued").order_by(col(Job.number)).limit(1)).first()

    def transition(self, job_id: str, to: JobStatus, *, error: JobError | None = None) -> Job:
        """Move a job along ``TRANSITIONS``; ``failed`` takes the ``error`` (see ``SelfprunerError.to_dict``).

        Sets ``started_at`` at the first start and ``finished_at`` at the end, and appends the event ``job.<status>``. A job that
        was asked to cancel is cancelled where it would be queued or paused. ConflictError, naming the state the job is in, when it
        may not move there.
        """
        with self._transaction() as write:
            return write.move(write.job(job_id), to, error)

    def request_cancel(self, job_id: str, *, owner: str | None = None) -> Job:
        """Cancel a queued or paused job at once; ask a running one to stop by setting ``cancel_requested``.

        Asking twice is harmless; ConflictError when the job has finished.
        """
        with self._transaction() as write:
            job = write.job(job_id, owner)
            if job.status != "running":
                return write.move(job, "cancelled")
            if not job.cancel_requested:
                job.cancel_requested = True
                write.event(job.id, "cancel_requested", "job.cancel_requested", "Cancellation was requested.")
            return job

    def requeue_running(self) -> list[Job]:
        """At server start: queue the jobs a dead server left running, oldest first; cancel those that were asked to stop."""
        with self._transaction() as write:
            running = write.session.exec(select(Job).where(Job.status == "running").order_by(col(Job.number))).all()
            return [job for job in running if write.move(job, "queued").status == "queued"]

    def set_result(self, job_id: str, result: Report) -> Job:
        """Store the final report. Its ``best_plan``, a plan hash, decides what the view ``best`` shows."""
        with self._transaction() as write:
            job = write.job(job_id)
            job.result = result.copy()
            return job

    def recorder(self, job_id: str) -> JobRecorder:
        """The search's way to write this job's history."""
        return JobRecorder(self._database, self._transaction, self.job(job_id).id)

    # History

    def events(self, job_id: str, after: int = 0, limit: int = 100) -> Page[Event]:
        """Events in order, those with a sequence number above ``after``."""
        query = select(Event).where(Event.job_id == job_id, col(Event.sequence) > after).order_by(col(Event.sequence))
        with self._database.reading() as session:
            return _page(session.exec(query.limit(_bound(limit) + 1)).all(), limit)

    def candidates(
        self, job_id: str, after: str | None = None, limit: int = 100, *, order: Literal["generation", "fitness"] = "generation"
    ) -> Page[CandidateRow]:
        """Candidates in order of generation, or best first as the view ``ranking`` has them; those after plan ``after``."""
        query = select(CandidateRow).where(CandidateRow.job_id == job_id)
        keys: list[SQLColumnExpression[object]] = [col(CandidateRow.generation), col(CandidateRow.sequence)]
        if order == "fitness":
            ranks = schema.ranking()
            keys = [ranks.c.place]
            query = query.join(ranks, (ranks.c.job_id == job_id) & (ranks.c.plan == col(CandidateRow.plan_hash)))
        query = query.order_by(*keys)
        with self._database.reading() as session:
            if after is not None:
                here = query.with_only_columns(*keys).where(col(CandidateRow.plan_hash) == after)
                cursor = session.execute(here).first()
                if cursor is None:
                    raise NotFoundError(
                        f"No candidate {after!r} in job {job_id}. Use the last plan of the page before.", param="after"
                    )
                query = query.where(tuple_(*keys) > tuple_(*(literal(value) for value in cursor)))
            return _page(session.exec(query.limit(_bound(limit) + 1)).all(), limit)

    def candidate(self, job_id: str, plan_hash: str, *, param: str | None = None) -> CandidateRow:
        """The plan of that hash, or of the only hash that begins so. NotFoundError where there is none, AmbiguousNameError where
        there are several."""
        begins = func.substr(col(CandidateRow.plan_hash), 1, len(plan_hash)) == plan_hash
        query = select(CandidateRow).where(CandidateRow.job_id == job_id, begins).order_by(col(CandidateRow.plan_hash))
        with self._database.reading() as session:
            row = session.get(CandidateRow, (job_id, plan_hash))
            rows = [row] if row is not None else session.exec(query.limit(SHOWN + 1)).all() if plan_hash else []
        if not rows:
            raise NotFoundError(
                f"No candidate {plan_hash!r} in job {job_id}. `selfpruner show` lists the best; the whole list is at "
                f"/v1/jobs/{job_id}/candidates, and in the view population of {self.path}.",
                param=param,
            )
        if len(rows) > 1:
            raise AmbiguousNameError("plan", plan_hash, [r.plan_hash for r in rows[:SHOWN]], more=len(rows) > SHOWN, param=param)
        return rows[0]

    def evaluations(self, job_id: str, plan_hash: str | None = None) -> list[EvaluationRow]:
        """All evaluations of a job, or of one plan, in order of creation."""
        query = select(EvaluationRow).where(EvaluationRow.job_id == job_id)
        if plan_hash is not None:
            query = query.where(EvaluationRow.plan_hash == plan_hash)
        with self._database.reading() as session:
            return list(session.exec(query.order_by(col(EvaluationRow.created_at), ROWID)))

    def llm_calls(self, job_id: str) -> list[LlmCallRow]:
        """All LLM calls of a job, in order."""
        query = select(LlmCallRow).where(LlmCallRow.job_id == job_id).order_by(col(LlmCallRow.sequence))
        with self._database.reading() as session:
            return list(session.exec(query))

    def totals(self, job_id: str) -> Totals:
        columns = (LlmCallRow.prompt_tokens, LlmCallRow.completion_tokens, LlmCallRow.seconds, LlmCallRow.cost)
        sums = [func.coalesce(func.sum(column), 0) for column in columns]
        with self._database.reading() as session:
            row = session.execute(select(func.count(), *sums).where(LlmCallRow.job_id == job_id)).one()
        return Totals(row[0], row[1], row[2], float(row[3]), float(row[4]))

    # Checkpoints

    def add_checkpoint(self, job_id: str, checkpoint: CheckpointFacts) -> Checkpoint:
        """Record an exported folder. One per job and plan: exporting again keeps the id and describes the newer files."""
        facts = {name: value for name, value in checkpoint.items() if name in CheckpointFacts.__required_keys__}
        with self._transaction() as write:
            write.job(job_id)
            made = Checkpoint.model_validate({"id": new_id("ckpt"), "job_id": job_id, "created_at": write.now, **facts})
            known = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.plan_hash == checkpoint["plan_hash"])
            row = write.session.exec(known).first()
            if row is None:
                write.session.add(made)
                return made
            return row.sqlmodel_update(made.model_dump(exclude={"id", "created_at"}))

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """A job's checkpoints, oldest first."""
        query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(col(Checkpoint.created_at), ROWID)
        with self._database.reading() as session:
            return list(session.exec(query))

    def checkpoint(self, checkpoint_id: str, *, owner: str | None = None) -> Checkpoint:
        with self._database.reading() as session:
            row = session.exec(select(Checkpoint).where(Checkpoint.id == checkpoint_id)).first()
            if row is None or (owner is not None and find_job(session, row.job_id).owner != owner):
                raise NotFoundError(f"No checkpoint {checkpoint_id!r}. List the checkpoints of a job to see the known ids.")
            return row

    @contextmanager
    def _transaction(self) -> Iterator[Transaction]:
        with self._database.writing() as session:
            write = Transaction(session, int(self._clock()))
            yield write
        if self.on_event is not None:
            for job_id, sequence in write.appended:
                self.on_event(job_id, sequence)
        if self.on_progress is not None:
            for job_id in write.progressed:
                self.on_progress(job_id)


def new_id(prefix: Literal["job", "ckpt"]) -> str:
    """A random id of URL-safe characters; nothing in it comes from a request."""
    return f"{prefix}_{secrets.token_hex(12)}"


def _page(rows: Sequence[Row], limit: int) -> Page[Row]:
    """A page of ``limit`` from a query that asked for one row more."""
    return Page(tuple(rows[:limit]), len(rows) > limit)


def _bound(limit: int) -> int:
    if limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}.", param="limit")
    return limit
