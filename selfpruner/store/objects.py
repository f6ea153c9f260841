"""What everybody sees of the rows: over HTTP, on the command line, in Python. Plain JSON, after the OpenAI fine-tuning job API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Generic, Literal, TypeVar

from pydantic import Field, GetPydanticSchema
from typing_extensions import ReadOnly, TypedDict

from selfpruner.files.report import Report
from selfpruner.records import CandidateStatus, CheckpointFacts, JobError, JobStatus, Severity, StoredConfig, StoredProgress

if TYPE_CHECKING:  # a client needs no database
    from selfpruner.store.tables import CandidateRow, Checkpoint, Event, Job

T = TypeVar("T")

# What any version stored: readers know its type, and the server sends it as it is.
Stored = Annotated[T, GetPydanticSchema(lambda _type, handler: handler(dict[str, object]))]
Facts = Mapping[str, object]  # a class below has a field named object


class JobObject(TypedDict):
    id: str
    object: Literal["job"]
    created_at: Annotated[int, Field(description="unix seconds")]
    started_at: int | None
    finished_at: int | None
    status: JobStatus
    error: JobError | None
    model: str
    seed: int
    metadata: dict[str, str]
    progress: Stored[StoredProgress] | None
    config: Stored[StoredConfig]
    result: Annotated[Stored[Report] | None, Field(description="the report, once the job has succeeded")]


class EventObject(TypedDict):
    """``id`` counts from 1 without gaps within the job; it is the cursor of the list and the id of the event stream."""

    id: int
    object: Literal["event"]
    created_at: int
    level: Severity
    type: str
    message: str
    data: Stored[Facts]


class CandidateObject(TypedDict):
    """``id`` is the plan's hash. ``fitness`` is nats per token on ``window``; ``relative`` is that over the uniform plan's on the
    same tokens, null for a front's plan of another rate; of a plan that was ``rejected`` early both are estimates. ``predicted`` is
    the ``relative`` that was expected before it was scored, ``credit`` the relative gain per second its operator was believed to
    bring, ``informed_by`` the latest generation whose scores the LLM knew."""

    id: str
    object: Literal["candidate"]
    created_at: int
    generation: int
    operator: str
    parents: list[str]
    levels: list[int]
    rates: list[float]
    status: CandidateStatus
    fitness: float | None
    relative: float | None
    window: str | None
    tokens: int
    reason: str | None
    survived: bool
    rejected: bool
    predicted: float | None
    credit: float | None
    informed_by: int | None


class CheckpointObject(CheckpointFacts):
    """``path`` is on the server's machine; ``files`` are served below its own address."""

    id: str
    object: Literal["checkpoint"]
    job_id: str
    created_at: int


class FileObject(TypedDict):
    """A file of a checkpoint; ``id`` is its name in the folder."""

    id: str
    object: Literal["file"]
    bytes: int
    sha256: str


class ModelObject(TypedDict):
    """A model that requests may name. ``source``: embedded, folder (below the server's model root) or hub (may hold * and ?)."""

    id: str
    object: Literal["model"]
    source: Literal["embedded", "folder", "hub"]
    description: str


class Identified(TypedDict):
    id: ReadOnly[str | int]


Item = TypeVar("Item", bound=Identified)


class ListObject(TypedDict, Generic[Item]):
    object: Literal["list"]
    data: list[Item]
    has_more: bool
    first_id: str | int | None
    last_id: str | int | None


def list_object(data: Sequence[Item], has_more: bool = False) -> ListObject[Item]:
    return {
        "object": "list",
        "data": list(data),
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def job_object(job: Job) -> JobObject:
    error = job.error
    return {
        "id": job.id,
        "object": "job",
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "status": job.status,
        "error": None if error is None else {"code": error["code"], "message": error["message"], "param": error.get("param")},
        "model": job.config["model"],
        "seed": job.config["seed"],
        "metadata": job.user_metadata,
        "progress": job.progress,
        "config": job.config,
        "result": job.result,
    }


def event_object(event: Event) -> EventObject:
    return {
        "id": event.sequence,
        "object": "event",
        "created_at": event.created_at,
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data,
    }


def candidate_object(row: CandidateRow) -> CandidateObject:
    return {
        "id": row.plan_hash,
        "object": "candidate",
        "created_at": row.created_at,
        "generation": row.generation,
        "operator": row.operator,
        "parents": row.parents,
        "levels": row.levels,
        "rates": row.rates,
        "status": row.status,
        "fitness": row.fitness,
        "relative": row.relative,
        "window": row.window,
        "tokens": row.tokens,
        "reason": row.reason,
        "survived": row.survived,
        "rejected": row.rejected,
        "predicted": row.predicted,
        "credit": row.credit,
        "informed_by": row.informed_by,
    }


def checkpoint_facts(row: Checkpoint) -> CheckpointFacts:
    return {
        "plan_hash": row.plan_hash,
        "path": row.path,
        "parameters": row.parameters,
        "bytes": row.bytes,
        "manifest_sha256": row.manifest_sha256,
        "verification": row.verification,
        "metrics": row.metrics,
    }


def checkpoint_object(row: Checkpoint) -> CheckpointObject:
    return {
        "id": row.id,
        "object": "checkpoint",
        "job_id": row.job_id,
        "created_at": row.created_at,
        **checkpoint_facts(row),
    }
