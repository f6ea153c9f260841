"""``/v1/jobs/{id}/candidates``: the plans a search made, with their origin and fitness."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query

from selfpruner.store.objects import CandidateObject, ListObject, candidate_object, list_object
from server.errors import responses
from server.routes.dependencies import Cursor, Limit, OwnJob, TheStore

router = APIRouter(prefix="/v1/jobs/{job_id}/candidates", tags=["candidates"])


@router.get("/{candidate_id}", responses=responses(404))
def get_candidate(
    job: OwnJob, store: TheStore, candidate_id: Annotated[str, Path(description="a plan's hash, or a beginning that only it has")]
) -> CandidateObject:
    return candidate_object(store.candidate(job.id, candidate_id))


@router.get("", responses=responses(404))
def list_candidates(
    job: OwnJob,
    store: TheStore,
    after: Cursor = None,
    limit: Limit = 20,
    order: Annotated[Literal["generation", "fitness"], Query(description="as they were made, or best first")] = "generation",
) -> ListObject[CandidateObject]:
    page = store.candidates(job.id, after, limit, order=order)
    return list_object([candidate_object(row) for row in page.data], page.has_more)
