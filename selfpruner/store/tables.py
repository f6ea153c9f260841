"""The tables, what a row may be, and the states of a job. Rows leave the store detached from any transaction.

    queued ---> running ---> succeeded | failed | cancelled
      |  ^       |   |
      |  +-------+   +-----> paused ---> queued | cancelled
      +--> cancelled         (running -> queued: the server stopped or restarted)

CHECK constraints keep impossible rows out whoever writes: an unknown status, a finished job without an end, a failed one without
its error, an infinite fitness, an evaluated candidate without fitness (SQLite stores NaN as NULL, so that is refused too).
Times are UTC unix seconds. A change here needs a migration; a test holds both equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal, get_args

from sqlalchemy import JSON, CheckConstraint, Column, Index, UniqueConstraint
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel
from sqlmodel.sql.sqltypes import AutoString

from selfpruner.files.report import Report
from selfpruner.proposers.base import OUTCOMES
from selfpruner.records import (
    CandidateStatus,
    EvaluationKind,
    EvaluationOutcome,
    JobError,
    JobStatus,
    Severity,
    StoredConfig,
    StoredProgress,
)

REVISION = "0005"

TRANSITIONS: Mapping[JobStatus, tuple[JobStatus, ...]] = {
    "queued": ("running", "cancelled"),
    "running": ("paused", "succeeded", "failed", "cancelled", "queued"),
    "paused": ("queued", "cancelled"),
    "succeeded": (),
    "failed": (),
    "cancelled": (),
}
TERMINAL: tuple[JobStatus, ...] = tuple(status for status, onward in TRANSITIONS.items() if not onward)


class Json(JSON):
    """A JSON column in which Python's None is SQL's NULL."""

    cache_ok = True

    def __init__(self) -> None:
        super().__init__(none_as_null=True)


def one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


def finite(*columns: str) -> str:
    """No infinity, and no text where a number belongs; NULL passes, as in every CHECK."""
    return " AND ".join(f"{column} BETWEEN -1e300 AND 1e300" for column in columns)


def json(column: str, kind: Literal["object", "array"]) -> str:
    return f"{column} IS NULL OR (json_valid({column}) AND json_type({column}) = '{kind}')"


def check(name: str, condition: str) -> CheckConstraint:
    return CheckConstraint(condition, name=name)


class DatabaseTable(SQLModel, registry=registry()):
    """Base of all tables, with metadata of its own."""


class Job(DatabaseTable, table=True):
    """A search. ``number`` is the order of creation; ``user_metadata`` is the column ``metadata``, the submitter's own pairs.

    ``checkpoint_number`` says which checkpoint of the database's folder a local search writes, see :mod:`selfpruner.jobs.runs`. It
    is NULL for a server's job. No request can set it, and whatever it is, it cannot lead out of the folder.
    """

    __tablename__: ClassVar[str] = "job"
    __table_args__: ClassVar[object] = (
        check("job_status", one_of("status", get_args(JobStatus))),
        check("job_finished", f"({one_of('status', TERMINAL)}) = (finished_at IS NOT NULL)"),
        check("job_started", f"{one_of('status', ('queued', 'cancelled'))} OR started_at IS NOT NULL"),
        check("job_error", "(status = 'failed') = (error IS NOT NULL)"),
        check("job_cancel_requested", "cancel_requested IN (0, 1)"),
        check("job_checkpoint_number", "checkpoint_number BETWEEN 1 AND 1000000000"),
        check("job_config_json", json("config", "object")),
        check("job_metadata_json", json("metadata", "object")),
        check("job_error_json", json("error", "object")),
        check("job_progress_json", json("progress", "object")),
        check("job_result_json", json("result", "object")),
        Index("job_by_status", "status", "number"),
        Index("job_by_owner", "owner", "number"),
    )

    number: int | None = Field(default=None, primary_key=True)
    id: str = Field(unique=True)
    owner: str
    status: JobStatus = Field(default="queued", sa_type=AutoString)
    cancel_requested: bool = False
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    config: StoredConfig = Field(sa_type=Json)
    user_metadata: dict[str, str] = Field(sa_column=Column("metadata", Json, nullable=False))
    progress: StoredProgress | None = Field(default=None, sa_type=Json)
    result: Report | None = Field(default=None, sa_type=Json)
    error: JobError | None = Field(default=None, sa_type=Json)
    checkpoint_number: int | None = None

    @property
    def finished(self) -> bool:
        return self.status in TERMINAL


class CandidateRow(DatabaseTable, table=True):
    """A plan of a job's search. ``sequence`` is its order of creation within the job, from 1. ``predicted``, ``credit`` and
    ``informed_by`` are what was believed when it was made, see :class:`selfpruner.records.Candidate`."""

    __tablename__: ClassVar[str] = "candidate"
    __table_args__: ClassVar[object] = (
        UniqueConstraint("job_id", "sequence", name="candidate_sequence"),
        check("candidate_status", one_of("status", get_args(CandidateStatus))),
        check("candidate_fitness", finite("fitness", "relative")),
        check("candidate_evaluated", "status <> 'evaluated' OR fitness IS NOT NULL"),
        check("candidate_reason", "status NOT IN ('infeasible', 'failed') OR reason IS NOT NULL"),
        check("candidate_counts", "generation >= 0 AND tokens >= 0 AND sequence >= 1 AND survived IN (0, 1)"),
        check("candidate_rejected", "rejected IN (0, 1) AND (rejected = 0 OR status = 'evaluated')"),
        check("candidate_beliefs", finite("predicted", "credit")),
        check("candidate_informed_by", "informed_by BETWEEN 0 AND generation"),
        check("candidate_levels_json", json("levels", "array")),
        check("candidate_rates_json", json("rates", "array")),
        check("candidate_parents_json", json("parents", "array")),
    )

    job_id: str = Field(primary_key=True, foreign_key="job.id")
    plan_hash: str = Field(primary_key=True)
    sequence: int
    created_at: int
    generation: int
    operator: str
    parents: list[str] = Field(sa_type=Json)
    levels: list[int] = Field(sa_type=Json)
    rates: list[float] = Field(sa_type=Json)
    status: CandidateStatus = Field(sa_type=AutoString)
    fitness: float | None = None
    relative: float | None = None
    window: str | None = None
    tokens: int
    reason: str | None = None
    survived: bool
    rejected: bool
    predicted: float | None = None
    credit: float | None = None
    informed_by: int | None = None


class EvaluationRow(DatabaseTable, table=True):
    """One plan on one window of text. Plans that are no candidates (probes, references) have rows too. nats per token. ``kind`` and
    ``outcome`` as in :mod:`selfpruner.records`; ``reason`` is for people."""

    __tablename__: ClassVar[str] = "evaluation"
    __table_args__: ClassVar[object] = (
        check("evaluation_finite", finite("kl", "nll", "seconds")),
        check("evaluation_kind", one_of("kind", get_args(EvaluationKind))),
        check("evaluation_outcome", one_of("outcome", get_args(EvaluationOutcome))),
        check("evaluation_figures", "(outcome = 'ok') = (kl IS NOT NULL OR nll IS NOT NULL)"),
        check("evaluation_reason", "outcome = 'ok' OR reason IS NOT NULL"),
        check("evaluation_counts", "tokens >= 0 AND seconds >= 0"),
    )

    job_id: str = Field(primary_key=True, foreign_key="job.id")
    plan_hash: str = Field(primary_key=True)
    window: str = Field(primary_key=True)
    created_at: int
    tokens: int
    kl: float | None = None
    nll: float | None = None
    seconds: float
    kind: str
    outcome: str
    reason: str | None = None


class LlmCallRow(DatabaseTable, table=True):
    """One call of the proposer: what was asked, what came back, what it cost."""

    __tablename__: ClassVar[str] = "llm_call"
    __table_args__: ClassVar[object] = (
        check("llm_call_outcome", one_of("outcome", OUTCOMES)),
        check("llm_call_finite", finite("seconds", "cost")),
        check("llm_call_counts", "prompt_tokens >= 0 AND completion_tokens >= 0 AND seconds >= 0 AND cost >= 0"),
        check("llm_call_messages_json", json("messages", "array")),
    )

    job_id: str = Field(primary_key=True, foreign_key="job.id")
    sequence: int = Field(primary_key=True)
    created_at: int
    generation: int
    operator: str
    proposer: str
    model: str
    messages: list[dict[str, str]] = Field(sa_type=Json)
    reply: str
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost: float
    detail: str


class StageRow(DatabaseTable, table=True):
    """What one stage of a job took, all of its runs together, see :class:`selfpruner.stages.Stage`."""

    __tablename__: ClassVar[str] = "stage"
    __table_args__: ClassVar[object] = (
        check("stage_finite", finite("seconds", "peak_mib")),
        check("stage_counts", "seconds >= 0 AND tokens >= 0 AND workers >= 0 AND peak_mib >= 0"),
    )

    job_id: str = Field(primary_key=True, foreign_key="job.id")
    name: str = Field(primary_key=True)
    seconds: float
    tokens: int
    workers: int
    peak_mib: float


class Event(DatabaseTable, table=True):
    """Something that happened in a job. ``sequence`` counts from 1 without gaps; ``key`` makes writing it twice harmless."""

    __tablename__: ClassVar[str] = "event"
    __table_args__: ClassVar[object] = (
        UniqueConstraint("job_id", "key", name="event_key"),
        check("event_level", one_of("level", get_args(Severity))),
        check("event_sequence", "sequence >= 1"),
        check("event_data_json", json("data", "object")),
    )

    job_id: str = Field(primary_key=True, foreign_key="job.id")
    sequence: int = Field(primary_key=True)
    created_at: int
    level: Severity = Field(sa_type=AutoString)
    type: str
    message: str
    data: dict[str, object] = Field(sa_type=Json)
    key: str


class Checkpoint(DatabaseTable, table=True):
    """An exported, verified folder: ``bytes`` on disk, ``parameters`` of the pruned model, sha256 of its manifest."""

    __tablename__: ClassVar[str] = "checkpoint"
    __table_args__: ClassVar[object] = (
        UniqueConstraint("job_id", "plan_hash", name="checkpoint_plan"),
        check("checkpoint_sizes", "parameters > 0 AND bytes > 0"),
        check("checkpoint_manifest", "length(manifest_sha256) = 64"),
        check("checkpoint_verification_json", json("verification", "object")),
        check("checkpoint_metrics_json", json("metrics", "object")),
    )

    id: str = Field(primary_key=True)
    job_id: str = Field(foreign_key="job.id")
    plan_hash: str
    created_at: int
    path: str
    parameters: int
    bytes: int
    manifest_sha256: str
    verification: dict[str, object] = Field(sa_type=Json)
    metrics: dict[str, object] = Field(sa_type=Json)


class Idempotency(DatabaseTable, table=True):
    """An Idempotency-Key of the last 24 hours, and the job it made."""

    __tablename__: ClassVar[str] = "idempotency"
    __table_args__: ClassVar[object] = (check("idempotency_key", "length(key) BETWEEN 1 AND 255"),)

    owner: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    body_hash: str
    job_id: str = Field(foreign_key="job.id")
    created_at: int
