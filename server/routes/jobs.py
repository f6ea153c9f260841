"""``/v1/jobs``: submit, list and retrieve jobs, and change their state."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from selfpruner.records import JobStatus
from selfpruner.store.objects import JobObject, ListObject, job_object, list_object
from server.admission import admit
from server.errors import responses
from server.routes.dependencies import Cursor, Limit, OwnJob, TheRunner, TheStore
from server.schemas import JobRequest
from server.security import Owner

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post(
    "",
    status_code=201,
    responses={
        **responses(400, 408, 409, 413, 415, 507),
        201: {
            "headers": {
                "Location": {"description": "address of the job", "schema": {"type": "string"}},
                "Idempotent-Replayed": {"description": "true: the job existed already", "schema": {"type": "string"}},
            }
        },
    },
)
def create_job(
    body: JobRequest,
    request: Request,
    response: Response,
    store: TheStore,
    runner: TheRunner,
    owner: Owner,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="same key, same body: the same job, for 24 hours")
    ] = None,
) -> JobObject:
    """Queue a search. What is wrong with the request is said now, and no job is made."""
    config = admit(body.config(), request.app.state.settings)
    # Hashed as it was sent: what `admit` makes of a path may change with the server's folders.
    sent = json.dumps(body.model_dump(mode="json"), sort_keys=True).encode()
    job, created = store.create_job(
        config,
        metadata=body.metadata,
        owner=owner,
        idempotency_key=idempotency_key,
        body_hash=hashlib.sha256(sent).hexdigest(),
    )
    if created:
        runner.submitted()
    else:
        response.headers["idempotent-replayed"] = "true"
    response.headers["location"] = f"/v1/jobs/{job.id}"
    return job_object(job)


@router.get("", responses=responses())
def list_jobs(
    store: TheStore, owner: Owner, after: Cursor = None, limit: Limit = 20, status: Annotated[JobStatus | None, Query()] = None
) -> ListObject[JobObject]:
    """The asker's jobs, newest first."""
    page = store.jobs(after, limit, owner=owner, status=status)
    return list_object([job_object(job) for job in page.data], page.has_more)


@router.get("/{job_id}", responses=responses(404))
def retrieve_job(job: OwnJob) -> JobObject:
    return job_object(job)


@router.post("/{job_id}/cancel", responses=responses(404, 409, 507))
async def cancel_job(job: OwnJob, store: TheStore, runner: TheRunner) -> JobObject:
    """Stop the job for good. Answers once it has stopped, within five seconds; 409 when it had finished already."""
    await runner.cancel(job.id)
    return job_object(await run_in_threadpool(store.job, job.id))


@router.post("/{job_id}/pause", responses=responses(404, 409, 507))
async def pause_job(job: OwnJob, store: TheStore, runner: TheRunner) -> JobObject:
    """Stop a running job and keep what it found; 409 when it is not running."""
    await runner.pause(job.id)
    return job_object(await run_in_threadpool(store.job, job.id))


@router.post("/{job_id}/resume", responses=responses(404, 409, 507))
async def resume_job(job: OwnJob, store: TheStore, runner: TheRunner) -> JobObject:
    """Queue a paused job again; it goes on from its last evaluation. 409 when it is not paused."""
    await runner.resume(job.id)
    return job_object(await run_in_threadpool(store.job, job.id))
