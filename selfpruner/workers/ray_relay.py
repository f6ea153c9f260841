"""What runs on a node of a Ray cluster for one worker: an actor that starts the worker's process there and passes messages on.

The worker is the same process as on one machine, so freezes, crashes, cancelled tasks and logs are dealt with by the same code. The
actor adds what distance needs: it can be found again by name after the server was killed, it ends by itself when nobody has asked
for it for a while, and it reads and writes files where the nodes have no folder in common.

Imports neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from selfpruner.files import atomic, cache_folder
from selfpruner.workers.worker_process import Link, Message

GRACE = 3.0  # seconds that a task left by an earlier pool gets to stop before its worker is killed
# Kinds of cache entries that one node makes for all. A model and a dataset have a name, by which every node finds them itself.
SHARED = ("texts", "statistics", "factors", "levels", "spectra", "latency")


class Relay:
    """``environment`` are variables that the worker gets unless the node sets them. Without a message for ``lease`` seconds the
    actor ends, and its worker with it."""

    def __init__(self, handler: str, device: str, heartbeat_timeout: float, environment: Mapping[str, str], lease: float) -> None:
        self._make = (handler, device)
        self._heartbeat_timeout = heartbeat_timeout
        self._environment = environment
        self._lease = lease
        self._log = Path(tempfile.mkdtemp(prefix="selfpruner-worker-")) / "worker.log"
        self._link: Link | None = None
        self._outbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._task: object = None  # the number of the task that the worker has not answered
        self._answered = asyncio.Event()
        self._touched = time.monotonic()
        self._running: list[asyncio.Task[None]] = []

    async def adopt(self) -> dict[str, object]:
        """Start the worker, or take over the one that an earlier pool left, whose task is stopped. Says what and where this is."""
        self.touch()
        if not self._running:
            self._running.append(asyncio.create_task(self._expire()))
        self._outbox.put_nowait(None)  # whoever listened until now listens no more
        self._outbox = asyncio.Queue()
        if self._link is not None and self._task is not None:
            await self._stop_task(self._link)
        if self._link is None or not self._link.alive:
            handler, device = self._make
            environment = {**self._environment, **os.environ}
            self._link = await Link.start(handler, device, self._log, self._heartbeat_timeout, environment)
            self._running.append(asyncio.create_task(self._pass_on(self._link)))
        return {"version": version("selfpruner"), "pid": self._link.pid}

    async def receive(self) -> AsyncIterator[Message]:
        """The worker's messages. The last one, ``{"op": "dead", "text": CAUSE}``, comes when it is dead."""
        outbox = self._outbox
        while (message := await outbox.get()) is not None:
            yield message

    async def send(self, message: Mapping[str, object]) -> None:
        self.touch()
        assert self._link is not None
        if message["op"] == "task":
            self._task = message["id"]
            self._answered.clear()
        await self._link.send(message)

    def touch(self) -> None:
        """Somebody still wants this worker."""
        self._touched = time.monotonic()

    async def end(self) -> None:
        if self._link is not None:
            await self._link.end()

    async def _pass_on(self, link: Link) -> None:
        while (message := await link.inbox.get()) is not None:
            if message["op"] != "progress" and message["id"] == self._task:
                self._task = None
                self._answered.set()
            self._outbox.put_nowait(message)
        await link.end()
        if link is self._link:
            self._outbox.put_nowait(Message(op="dead", text=link.cause()))
            self._outbox.put_nowait(None)

    async def _stop_task(self, link: Link) -> None:
        await link.send({"op": "cancel", "id": self._task})
        try:
            await asyncio.wait_for(self._answered.wait(), GRACE)
        except TimeoutError:
            self._link = None  # its death is no news of the next one's
            await link.end()
        self._task = None

    async def _expire(self) -> None:
        while time.monotonic() - self._touched < self._lease:
            await asyncio.sleep(min(1.0, self._lease / 4))
        await self.end()
        os._exit(0)

    # -- files ---------------------------------------------------------------------------------------------------------
    def used_entries(self, cache: str, since: float) -> list[str]:
        """The entries of the cache, by their paths in it, that were used in the last ``since`` seconds and that nodes share."""
        root = Path(cache)
        oldest = time.time() - since
        listed = cache_folder.entries(root)
        return [str(entry.path.relative_to(root)) for entry in listed if entry.kind in SHARED and entry.used >= oldest]

    def listing(self, root: str, entries: Sequence[str]) -> dict[str, int]:
        """The files at and below ``entries`` of the folder ``root``, with their sizes."""
        found: dict[str, int] = {}
        for entry in entries:
            path = Path(root) / entry
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            found |= {str(file.relative_to(root)): file.stat().st_size for file in files if file.suffix != ".tmp"}
        return found

    def read(self, root: str, name: str) -> bytes:
        return (Path(root) / name).read_bytes()

    def write(self, root: str, name: str, data: bytes) -> None:
        write_file(Path(root), name, data)


def write_file(root: Path, name: str, data: bytes) -> None:
    """Put a file that came from another node at ``name`` below ``root``, whole or not at all."""
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(file) as aside:
        aside.write_bytes(data)
