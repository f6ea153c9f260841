"""Tell event streams that something happened in a job, from whatever thread it happened in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class News:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._readers: dict[str, set[asyncio.Event]] = {}

    def publish(self, job_id: str, _sequence: int) -> None:
        """Wake the streams of this job: the store's ``on_event``. Safe from any thread; does nothing once the loop has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake, job_id)

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set at every publication; the reader clears it before it reads."""
        event = asyncio.Event()
        self._readers.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            readers = self._readers[job_id]
            readers.discard(event)
            if not readers:
                del self._readers[job_id]

    def _wake(self, job_id: str) -> None:
        for event in self._readers.get(job_id, ()):
            event.set()
