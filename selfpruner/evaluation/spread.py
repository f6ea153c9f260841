"""The slow part of a preparation on all workers: statistics by sequences, what is made of them by layers. Imports no torch.

Sums over sequences merge exactly, and a layer's order and repairs follow from its statistics and weights alone. Everything goes
through the cache: the worker that is then asked to prepare finds it made. A worker that dies costs its own part.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from selfpruner.config import Role
from selfpruner.progress import OnProgress
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import BeginRequest, MakeRequest, StatisticsRequest

# Pieces per worker that layers are cut into: a slower worker takes fewer.
PER_WORKER = 3


async def measure(
    pool: WorkerPool, session: Session, texts: Sequence[Role], output: str | None, on_progress: OnProgress | None = None
) -> None:
    """Make texts, statistics and factors or levels for ``session``, as far as they are not in the cache and several workers can."""
    roles: list[Role] = ["calibration", *(role for role in texts if role != "calibration")]
    first = BeginRequest(texts=("calibration",), workers=pool.workers, output=output)
    # The model is fetched and converted by one; the other texts are written beside the first one.
    others = [BeginRequest(texts=(role,), workers=pool.workers) for role in roles[1:]]
    begun, *_ = await asyncio.gather(*(pool.run(session, request, on_progress) for request in (first, *others)))
    if begun.shares:
        await asyncio.gather(
            *(
                pool.run(session, StatisticsRequest(part=part, parts=begun.shares), on_progress if part == 0 else None)
                for part in range(begun.shares)
            )
        )
    layers, pieces = begun.layers, min(PER_WORKER * pool.workers, len(begun.layers))
    await asyncio.gather(
        *(pool.run(session, MakeRequest(layers=layers[piece::pieces], parts=begun.shares), on_progress) for piece in range(pieces))
    )
    if begun.shares:
        await pool.run(session, MakeRequest(layers=(), parts=begun.shares))
