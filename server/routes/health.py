"""``/healthz``: does the process answer? It reads no database, so a busy disk does not make it look dead."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["ok", "stopping"]
    version: str
    running_jobs: int


@router.get("/healthz")
async def healthz(request: Request) -> Health:
    runner = request.app.state.runner
    return Health(status="stopping" if runner.stopping.is_set() else "ok", version=request.app.version, running_jobs=runner.running)
