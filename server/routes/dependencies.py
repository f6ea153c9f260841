"""What routes share: the store and runner of their application, the job that an address names, and paging parameters."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Path, Query, Request

from selfpruner.store.store import Store
from selfpruner.store.tables import Job
from server.runner import Runner
from server.security import Owner


def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


def _runner(request: Request) -> Runner:
    return cast(Runner, request.app.state.runner)


TheStore = Annotated[Store, Depends(_store)]
TheRunner = Annotated[Runner, Depends(_runner)]


def _job(job_id: Annotated[str, Path(max_length=64)], store: TheStore, owner: Owner) -> Job:
    return store.job(job_id, owner=owner)


# The job of the address, when it is the asker's; 404 otherwise.
OwnJob = Annotated[Job, Depends(_job)]
Limit = Annotated[int, Query(ge=1, le=100)]
Cursor = Annotated[str | None, Query(max_length=64, description="the last id of the page before")]
