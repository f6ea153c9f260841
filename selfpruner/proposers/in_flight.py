"""A question in flight while workers score: started before, awaited after, never left behind.

    async with in_flight(offspring(context.snapshot())) as asked:  # the proposer writes ...
        await score(generation)  # ... while the workers score
        children = await asked

The context is a snapshot from before the scoring, so the children are informed by scores one generation old. That is the price of
never waiting for the LLM, and ``Offspring.informed_by`` records it. Because the context does not depend on which of the two ends
first, a resumed search repeats the same questions in the same order. One coroutine asks all the questions of a generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


@asynccontextmanager
async def in_flight(asking: Coroutine[object, None, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Run ``asking`` beside the block. A block that ends before it was awaited, by an error or by cancellation, cancels it and
    waits until it has stopped: after the block nothing asks, counts or records any more."""
    task = asyncio.create_task(asking)
    try:
        await asyncio.sleep(0)  # the request leaves before the workers get theirs
        yield task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, so that an error nobody awaited is not reported as lost
