"""One worker process as its parent sees it: start, send, receive, notice its death, end it. Knows nothing of queues or retries."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypedDict

from selfpruner.workers.lifeline import tied

# The longest line a worker may send. A result holds numbers and texts; what is larger belongs in a file.
LIMIT = 256 * 2**20
_BEATS = 4  # signs of life a worker sends per heartbeat timeout
_CHECKS = 8  # and how often the parent looks in that time
_TAIL_BYTES = 8192
_TAIL_LINES = 50


class Message(TypedDict, total=False):
    """What a worker says of the task ``id``: progress has a ``text`` and whether it is a ``Foreseen``, an answer a ``result`` or
    an ``error``."""

    op: str
    id: int
    text: str
    foreseen: bool
    result: object
    error: dict[str, object]


class Connection(Protocol):
    """One incarnation of a worker, wherever it runs. ``inbox`` yields its messages, then None once it is dead and everything it
    said was read."""

    inbox: asyncio.Queue[Message | None]
    alive: bool

    @property
    def pid(self) -> int: ...

    async def send(self, message: Mapping[str, object]) -> None:
        """A worker that died meanwhile is noticed in ``inbox``, not here."""

    async def end(self) -> None:
        """Kill the worker and what it started."""

    def cause(self) -> str:
        """Why the worker is dead, what to do about it, and the last lines it logged. Call after :meth:`end`."""


class Link:
    """A :class:`Connection` to a process of this machine."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, log_start: int, heartbeat_timeout: float) -> None:
        self._process = process
        self._log = log
        self._log_start = log_start
        self._timeout = heartbeat_timeout
        self._silence = 0
        self._frozen = False
        self._garbled = ""
        self.inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self.alive = True
        self._reader = asyncio.create_task(self._read())
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, handler: str, device: str, log: Path, heartbeat_timeout: float, environment: Mapping[str, str]) -> Link:
        """Start a worker; it imports the handler with its first task. ``environment`` are all of its variables. Raises OSError when
        the process cannot be made."""
        with log.open("ab") as sink:
            start = sink.tell()
            process = await asyncio.create_subprocess_exec(
                *tied(
                    "-P",  # a file in the current folder must not stand in for a library
                    "-m",
                    "selfpruner.workers.child",
                    f"--handler={handler}",
                    f"--device={device}",
                    f"--heartbeat={heartbeat_timeout / _BEATS}",
                ),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=sink,
                env=environment,
                limit=LIMIT,
                # Its own group: Ctrl-C in the terminal reaches the parent only, and what the worker starts ends with it.
                start_new_session=True,
            )
        return cls(process, log, start, heartbeat_timeout)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(self, message: Mapping[str, object]) -> None:
        """Write one message. A worker that died meanwhile is noticed in ``inbox``, not here."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            await self._process.stdin.drain()

    async def end(self) -> None:
        """Kill the worker and what it started, and wait until they are reaped."""
        self._kill()
        await self._process.wait()
        await asyncio.wait([self._reader])
        self._watcher.cancel()
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(ConnectionError):
            await self._process.stdin.wait_closed()

    def cause(self) -> str:
        """Why the worker is dead, what to do about it, and the last lines it logged. Call after :meth:`end`."""
        code = self._process.returncode
        if self._frozen:
            what = f"gave no sign of life for {self._timeout:g} s and was replaced. Was the machine suspended or out of memory?"
        elif self._garbled:
            what = f"sent something that is not a message ({self._garbled}) and was replaced."
        elif code is not None and code < 0:
            name = signal.Signals(-code).name
            advice = {
                "SIGKILL": "Probably the system ran out of memory: use a smaller model, shorter sequences or fewer workers.",
                "SIGTERM": "Something on this machine asked it to stop.",
            }.get(name, "Native code crashed: check the versions of torch and its drivers.")
            what = f"was ended by {name}. {advice}"
        else:
            what = f"exited with code {code}. Its log says why."
        tail = self._tail()
        return f"{what} Log: {self._log}" + (f", last lines:\n{tail}" if tail else " (empty).")

    def _tail(self) -> str:
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
            return "\n".join(lines[-_TAIL_LINES:])
        return ""

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            # A line without its end was cut off by the worker's death.
            while (line := await self._process.stdout.readline()).endswith(b"\n"):
                self._silence = 0
                message = json.loads(line)
                if message["op"] != "heartbeat":
                    self.inbox.put_nowait(message)
        except (ValueError, TypeError, KeyError) as error:
            self._garbled = f"{type(error).__name__}: {error}"[:200]
        finally:
            self.alive = False
            self.inbox.put_nowait(None)
            self._kill()

    async def _watch(self) -> None:
        """Kill a silent worker. Looks are counted, not seconds: a parent that was itself suspended must not blame its worker."""
        while self.alive:
            await asyncio.sleep(self._timeout / _CHECKS)
            self._silence += 1
            if self._silence > _CHECKS and self.alive:
                self._frozen = True
                self._kill()
                return
