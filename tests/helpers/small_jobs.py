"""Whole jobs that take a second: their config, a pool that counts its tasks, a place with model, text and store."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfpruner.config import SearchConfig
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.lifecycle import JobResult
from selfpruner.jobs.run import run_job
from selfpruner.progress import OnProgress
from selfpruner.proposers import ProposerSettings
from selfpruner.store.store import Store
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import R, TaskRequest
from selfpruner.workers.thread_pool import InProcessPool

RATE = 0.2
TIGHT = 1 << 14  # bytes for the head: it comes in pieces


class Recording:
    """A pool that notes which tasks went through, and to whom."""

    workers = 1

    def __init__(self, inner: WorkerPool | None = None) -> None:
        self.inner = inner or InProcessPool(lambda: SessionHandler("cpu"))
        self.tasks: Counter[str] = Counter()

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        self.tasks[request.kind] += 1
        return await self.inner.run(session, request, on_progress)

    async def close(self) -> None:
        await self.inner.close()


def config_of(model: Path, text: Path, **changes: Any) -> SearchConfig:
    def words(sequences: int) -> dict[str, Any]:
        return {"sources": [{"source": str(text)}], "sequences": sequences, "length": 64}

    small: dict[str, Any] = {
        "model": str(model),
        "rate": RATE,
        "preset": "evolution",
        "ffn_step": 8,
        "calibration": words(16),
        "fitness_text": words(60),
        "report_text": words(8),
        "probe_tokens": 128,
        "generations": 2,
        "stages": [{"tokens": 64, "keep": 3}, {"tokens": 128, "keep": 2}],
        "final_tokens": 256,
        "population": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    return SearchConfig.model_validate({**small, **changes})


@dataclass(frozen=True)
class Place:
    """Where jobs run: a store, a cache, a model, a text."""

    folder: Path
    model: Path
    text: Path
    store: Store

    def run(
        self,
        config: SearchConfig,
        job_id: str,
        name: str = "checkpoint",
        inner: WorkerPool | None = None,
        **settings: ProposerSettings,
    ) -> tuple[JobResult, Counter[str]]:
        pool = Recording(inner)

        async def go() -> JobResult:
            try:
                return await run_job(
                    config,
                    job_id=job_id,
                    pool=pool,
                    proposer_settings=settings,
                    recorder=self.store.recorder(job_id),
                    cache=self.folder / "cache",
                    checkpoint_dir=self.folder / name,
                )
            finally:
                await pool.close()

        return asyncio.run(go()), pool.tasks

    def job(self, config: SearchConfig) -> str:
        return self.store.create_job(config)[0].id
