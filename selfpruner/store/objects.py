"""Rows as everybody sees them: over HTTP, on the command line, in Python. After the OpenAI fine-tuning job API."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from selfpruner.json_objects import JsonObject
from selfpruner.store.tables import CandidateRow, Checkpoint, Event, Job, JobStatus


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class JobObject(BaseModel):
    id: str
    object: Literal["job"] = "job"
    created_at: int = Field(description="unix seconds")
    started_at: int | None
    finished_at: int | None
    status: JobStatus
    error: JobError | None
    model: str
    seed: int
    metadata: dict[str, str]
    progress: JsonObject | None
    config: JsonObject
    result: JsonObject | None = Field(description="the report, once the job has succeeded")

    @classmethod
    def of(cls, job: Job) -> JobObject:
        error = None
        if job.error is not None:
            error = JobError(code=job.error["code"], message=job.error["message"], param=job.error.get("param"))
        return cls(
            id=job.id,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            status=job.status,
            error=error,
            model=job.config["model"],
            seed=job.config["seed"],
            metadata=job.user_metadata,
            progress=job.progress,
            config=job.config,
            result=job.result,
        )


class EventObject(BaseModel):
    """``id`` counts from 1 without gaps within the job; it is the cursor of the list and the id of the event stream."""

    id: int
    object: Literal["event"] = "event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: str
    message: str
    data: JsonObject

    @classmethod
    def of(cls, event: Event) -> EventObject:
        return cls(
            id=event.sequence,
            created_at=event.created_at,
            level=event.level,
            type=event.type,
            message=event.message,
            data=event.data,
        )


class CandidateObject(BaseModel):
    """``id`` is the plan's hash. ``fitness`` is nats per token on ``window``; ``relative`` is that over the uniform plan's on the
    same tokens, null for a front's plan of another rate; of a plan that was ``rejected`` early both are estimates. ``predicted`` is
    the ``relative`` that was expected before it was scored, ``credit`` the relative gain per second its operator was believed to
    bring, ``informed_by`` the latest generation whose scores the LLM knew."""

    id: str
    object: Literal["candidate"] = "candidate"
    created_at: int
    generation: int
    operator: str
    parents: list[str]
    levels: list[int]
    rates: list[float]
    status: Literal["pending", "evaluated", "infeasible", "failed"]
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

    @classmethod
    def of(cls, row: CandidateRow) -> CandidateObject:
        return cls(id=row.plan_hash, **row.model_dump(exclude={"job_id", "plan_hash", "sequence"}))


class CheckpointObject(BaseModel):
    """An exported and verified checkpoint. ``path`` is on the server's machine; ``files`` are served below its own address."""

    id: str
    object: Literal["checkpoint"] = "checkpoint"
    job_id: str
    created_at: int
    plan_hash: str
    path: str
    parameters: int
    bytes: int
    manifest_sha256: str
    verification: JsonObject
    metrics: JsonObject

    @classmethod
    def of(cls, row: Checkpoint) -> CheckpointObject:
        return cls(**row.model_dump())
