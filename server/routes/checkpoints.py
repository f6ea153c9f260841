"""``/v1/jobs/{id}/checkpoints``: what a job exported."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from selfpruner.errors import NotFoundError
from selfpruner.store.tables import Checkpoint
from server.errors import responses
from server.routes.dependencies import Cursor, Limit, OwnJob, TheStore
from server.schemas import CheckpointObject, ListObject

router = APIRouter(prefix="/v1/jobs/{job_id}/checkpoints", tags=["checkpoints"])


@router.get("", responses=responses(404))
def list_checkpoints(job: OwnJob, store: TheStore, after: Cursor = None, limit: Limit = 20) -> ListObject[CheckpointObject]:
    """Oldest first."""
    rows = store.checkpoints(job.id)
    if after is not None:
        place = next((index for index, row in enumerate(rows) if row.id == after), None)
        if place is None:
            raise NotFoundError(f"No checkpoint {after!r} in job {job.id}. Use the last id of the page before.", param="after")
        rows = rows[place + 1 :]
    data = [CheckpointObject.of(row) for row in rows[:limit]]
    return ListObject[CheckpointObject].of(data, len(rows) > limit)


@router.get("/{checkpoint_id}", responses=responses(404))
def retrieve_checkpoint(job: OwnJob, checkpoint_id: Annotated[str, Path(max_length=64)], store: TheStore) -> CheckpointObject:
    return CheckpointObject.of(_checkpoint(job.id, checkpoint_id, store))


def _checkpoint(job_id: str, checkpoint_id: str, store: TheStore) -> Checkpoint:
    row = store.checkpoint(checkpoint_id)
    if row.job_id != job_id:
        raise NotFoundError(f"No checkpoint {checkpoint_id!r} in job {job_id}. List them with /v1/jobs/{job_id}/checkpoints.")
    return row
