"""A pool whose tasks are told to the stages of one job: how long they waited and worked, on which worker, in how much memory."""

from __future__ import annotations

from selfpruner.progress import OnProgress
from selfpruner.stages import Stages, Task
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import R, TaskRequest


class StagedPool:
    """``pool`` does the work, and stays its owner's to close."""

    def __init__(self, pool: WorkerPool, stages: Stages) -> None:
        self._pool = pool
        self._stages = stages

    @property
    def workers(self) -> int:
        return self._pool.workers

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        """See :meth:`selfpruner.workers.base.WorkerPool.run`."""
        asked = self._stages.clock()
        result = await self._pool.run(session, request, on_progress)
        ended = self._stages.clock()
        begun = max(asked, ended - result.busy)
        self._stages.did(Task(asked, begun, ended, result.worker, result.peak_mib, result.parts))
        return result

    async def close(self) -> None:
        await self._pool.close()
