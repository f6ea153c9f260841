"""The pool protocol without processes: one thread of this process does the tasks, one at a time. For the command line and Python.

Requests and results pass through JSON as they would between processes, so a caller cannot tell the pools apart. A thread has two
limits: a crash takes this process along, and a task that never looks at its cancellation flag cannot be stopped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from selfpruner.errors import CancelledTaskError, WorkerError
from selfpruner.progress import OnProgress
from selfpruner.workers.base import Session, TaskHandler, perform
from selfpruner.workers.failures import classify, is_expected
from selfpruner.workers.tasks import R, TaskRequest

_log = logging.getLogger(__name__)


class InProcessPool:
    """A :class:`~selfpruner.workers.base.WorkerPool` of one thread; ``handler_factory`` is called there, with the first task."""

    def __init__(self, handler_factory: Callable[[], TaskHandler]) -> None:
        self._factory = handler_factory
        self._handler: TaskHandler | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="selfpruner-worker")
        self._flags: set[threading.Event] = set()
        self._closed = False

    @property
    def workers(self) -> int:
        return 1

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        """See :meth:`selfpruner.workers.base.WorkerPool.run`. Returns, or raises, only after the work has stopped."""
        if self._closed:
            raise WorkerError("The worker pool is closed. Make a new one.", code="pool_closed")
        loop = asyncio.get_running_loop()
        flag = threading.Event()

        def progress(text: str) -> None:
            if on_progress is not None:
                loop.call_soon_threadsafe(on_progress, text)

        self._flags.add(flag)
        task = self._thread.submit(self._handle, session, request, progress, flag)
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

    def _handle(self, session: Session, request: TaskRequest[R], progress: OnProgress, flag: threading.Event) -> R:
        try:
            if flag.is_set():
                raise CancelledTaskError("The task was cancelled before it started.")
            if self._handler is None:
                self._handler = self._factory()
            result = perform(self._handler, session, request.kind, request.to_json(), progress, flag.is_set)
            return request.result_type().read(result)
        except Exception as error:
            if not is_expected(error):
                # It is the cause of what is raised here: whoever lets that pass shows the traceback, whoever catches it need not.
                _log.debug("task %s failed", request.kind, exc_info=True)
            raise classify(error) from error
