"""The pool protocol: how tasks (:mod:`selfpruner.workers.tasks`) reach whatever owns a device.

Every call carries the whole *session* (the job's config): a worker prepares it when it does not hold it, so a replaced worker, a
restarted server or a second job on the same model need no special case. Statistics are cached on disk, which makes
preparing again cheap.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from pydantic import JsonValue

from selfpruner.errors import ConfigError
from selfpruner.models.memory import fresh_peak_mib
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.stages import Stages, collecting
from selfpruner.workers.tasks import R, TaskRequest, TaskResult


@dataclass(frozen=True, slots=True)
class Session:
    """What a worker must hold to do a task: ``config`` is a dumped SearchConfig, ``cache`` a folder for statistics and texts. With
    a ``plan`` (levels) nothing is asked for but its export, and what only others need may be left out."""

    key: str
    config: Mapping[str, object]
    cache: str
    plan: Sequence[int] | None = None


class WorkerPool(Protocol):
    @property
    def workers(self) -> int:
        """How many tasks it can do at a time."""

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        """Do one task and return its result.

        A worker that dies is replaced and the task run again; after ``max_attempts`` deaths on one task, or when the task
        itself fails, a WorkerError (or the typed error the task raised, see ``errors.from_dict``) is raised. Cancelling the
        awaiting asyncio task stops the work within seconds.
        """

    async def close(self) -> None: ...


class TaskHandler(Protocol):
    """The torch side. Blocking; one call at a time. ``cancelled`` is polled between layers and steps. ``requests`` are what it can
    do."""

    @property
    def requests(self) -> Collection[type[TaskRequest[TaskResult]]]: ...

    def handle(self, session: Session, request: TaskRequest[R], progress: OnProgress, cancelled: Cancelled) -> R: ...


def perform(
    handler: TaskHandler, session: Session, kind: str, body: object, progress: OnProgress, cancelled: Cancelled
) -> dict[str, JsonValue]:
    """One task as it came over the wire, done and put back on it. Raises ConfigError for a kind that ``handler`` does not know, and
    ContractError where request or result is not what its kind says."""
    known = {request.kind: request for request in handler.requests}
    if kind not in known:
        raise ConfigError(f"Unknown task {kind!r}. Known: {', '.join(known)}.")
    request = known[kind].read(body)
    stages = Stages(peak=fresh_peak_mib)
    with collecting(stages):
        result = request.answered(handler.handle(session, request, progress, cancelled))
    parts = stages.rows()
    return {
        **result.to_json(),
        "peak_mib": max(part.peak_mib for part in parts),
        "busy": sum(part.seconds for part in parts),
        "worker": f"{platform.node()}:{os.getpid()}:{threading.get_native_id()}",
        "parts": [asdict(part) for part in parts],
    }
