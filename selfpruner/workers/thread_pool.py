"""The pool protocol without processes: one thread of this process does the tasks, one at a time. For the command line and Python.

Payloads and results pass through JSON as they would between processes, so a caller cannot tell the pools apart. A thread has two
limits: a crash takes this process along, and a task that never looks at its cancellation flag cannot be stopped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from selfpruner.errors import CancelledTaskError, WorkerError
from selfpruner.models.memory import peak_mib
from selfpruner.progress import OnProgress
from selfpruner.workers.base import Json, Session, TaskHandler
from selfpruner.workers.failures import classify, is_expected

_log = logging.getLogger(__name__)


class InProcessPool:
    """A :class:`~selfpruner.workers.base.WorkerPool` of one thread; ``runtime_factory`` is called there, with the first task."""

    def __init__(self, runtime_factory: Callable[[], TaskHandler]) -> None:
        self._factory = runtime_factory
        self._runtime: TaskHandler | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="selfpruner-worker")
        self._flags: set[threading.Event] = set()
        self._closed = False

    async def run(self, session: Session, kind: str, payload: Mapping[str, object], on_progress: OnProgress | None = None) -> Json:
        """See :meth:`selfpruner.workers.base.WorkerPool.run`. Returns, or raises, only after the work has stopped."""
        if self._closed:
            raise WorkerError("The worker pool is closed. Make a new one.", code="pool_closed")
        loop = asyncio.get_running_loop()
        flag = threading.Event()
        plain = json.loads(json.dumps(dict(payload)))

        def progress(text: str) -> None:
            if on_progress is not None:
                loop.call_soon_threadsafe(on_progress, text)

        self._flags.add(flag)
        task = self._thread.submit(self._handle, session, kind, plain, progress, flag)
        work = asyncio.wrap_future(task)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            flag.set()
            if not task.cancel():  # it runs already, so it has to see the flag
                await asyncio.wait([work])
                if not work.cancelled():
                    work.exception()  # looked at: what a cancelled task says is of no interest
            raise
        finally:
            self._flags.discard(flag)

    async def close(self) -> None:
        """Cancel what runs and wait for the thread."""
        self._closed = True
        for flag in self._flags:
            flag.set()
        await asyncio.to_thread(self._thread.shutdown, wait=True)

    def _handle(self, session: Session, kind: str, payload: Json, progress: OnProgress, flag: threading.Event) -> Json:
        try:
            if flag.is_set():
                raise CancelledTaskError("The task was cancelled before it started.")
            if self._runtime is None:
                self._runtime = self._factory()
            result = self._runtime.handle(session, kind, payload, progress, flag.is_set)
            plain: Json = json.loads(json.dumps({**result, "peak_mib": peak_mib()}))
            return plain
        except Exception as error:
            if not is_expected(error):
                # It is the cause of what is raised here: whoever lets that pass shows the traceback, whoever catches it need not.
                _log.debug("task %s failed", kind, exc_info=True)
            raise classify(error) from error
