"""A TaskHandler without a model: what a worker pool has to cope with, one request each. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import JsonValue

from selfpruner.errors import CancelledTaskError, ModelNotFoundError, ProposerError, UnsupportedModelError
from selfpruner.progress import Foreseen
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import R, TaskRequest, TaskResult


class Done(TaskResult):
    """Who did it, and for which sessions so far; the other fields are those of the request that has them."""

    device: str
    pid: int
    sessions: list[str]
    value: JsonValue = None
    text: str = ""
    started: float = 0.0
    ended: float = 0.0
    deaths: int = 0


class Echo(TaskRequest[Done]):
    kind: ClassVar[str] = "echo"
    value: JsonValue = None
    say: tuple[str, ...] = ()
    foresee: str = ""


class Note(TaskRequest[Done]):
    """Sleep in small steps, then append a line to a file: shows whether a task ran to its end, and how often."""

    kind: ClassVar[str] = "note"
    seconds: float
    file: str
    text: str


class Stubborn(TaskRequest[Done]):
    """Never looks at its flag."""

    kind: ClassVar[str] = "stubborn"


class Noisy(TaskRequest[Done]):
    """Prints what looks like a message."""

    kind: ClassVar[str] = "noisy"


class Grandchild(TaskRequest[Done]):
    """Starts a process and tells its id."""

    kind: ClassVar[str] = "grandchild"


class Fail(TaskRequest[Done]):
    kind: ClassVar[str] = "fail"
    how: str


class Crash(TaskRequest[Done]):
    """Die as told, as long as fewer than ``times`` deaths are noted in ``file``."""

    kind: ClassVar[str] = "crash"
    how: str
    times: int
    file: str


class Unheard(TaskRequest[Done]):
    """A request that the handler does not know."""

    kind: ClassVar[str] = "unheard"


class FakeHandler:
    def __init__(self, device: str) -> None:
        self.device = device
        self.sessions: list[str] = []
        self.requests: tuple[type[TaskRequest[Any]], ...] = (Echo, Note, Stubborn, Noisy, Grandchild, Fail, Crash)

    def handle(
        self, session: Session, request: TaskRequest[R], progress: Callable[[str], None], cancelled: Callable[[], bool]
    ) -> R:
        if not self.sessions or self.sessions[-1] != session.key:
            self.sessions.append(session.key)
        self.progress, self.cancelled = progress, cancelled
        result: R = getattr(self, request.kind)(request)
        return result

    def done(self, **fields: Any) -> Done:
        return Done(device=self.device, pid=os.getpid(), sessions=self.sessions, **fields)

    def echo(self, request: Echo) -> Done:
        for text in request.say:
            self.progress(text)
        if request.foresee:
            self.progress(Foreseen(request.foresee))
        return self.done(value=request.value)

    def note(self, request: Note) -> Done:
        end = time.monotonic() + request.seconds
        self.progress("started")
        while time.monotonic() < end:
            if self.cancelled():
                raise CancelledTaskError("stopped as asked")
            time.sleep(0.01)
        with Path(request.file).open("a") as file:
            file.write(f"{request.text}\n")
        return self.done(text=request.text, started=end - request.seconds, ended=time.monotonic())

    def stubborn(self, _: Stubborn) -> Done:
        self.progress("started")
        time.sleep(60)
        return self.done()

    def noisy(self, _: Noisy) -> Done:
        print('{"op": "result", "id": 1, "result": {}}')
        os.write(1, b"raw bytes on descriptor 1\n")
        subprocess.run([sys.executable, "-c", "import sys; print('grandchild', sys.stdin.read())"], check=True)
        return self.done()

    def grandchild(self, _: Grandchild) -> Done:
        self.progress(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
        return self.done()

    def fail(self, request: Fail) -> Done:
        match request.how:
            case "typed":
                raise UnsupportedModelError("no adapter for this; use llama", param="model")
            case "model":
                raise ModelNotFoundError("There is no model /models/tiny.", param="model")
            case "own code":
                raise ProposerError("took too long", code="timeout")
            case "memory":
                raise MemoryError
            case "torch memory":
                raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB")
            case "torch cpu memory":
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            case "disk":
                raise OSError(28, "No space left on device", "model.safetensors")
            case "unexpected":
                raise KeyError("surprise")
            case "exit":
                raise SystemExit(3)
            case "wrong type":
                return self.done(deaths="none")
            case "wrong class":
                return TaskResult()  # type: ignore[return-value]
            case "unchecked":
                return Done.model_construct({"device", "pid"}, device=self.device, pid="mine")
        raise AssertionError(request)

    def crash(self, request: Crash) -> Done:
        deaths = Path(request.file)
        count = len(deaths.read_text()) if deaths.exists() else 0
        if count < request.times:
            deaths.write_text("x" * (count + 1))
            print("last words", file=sys.stderr, flush=True)
            if request.how == "exit":
                os._exit(7)
            os.kill(os.getpid(), signal.Signals[request.how])
        return self.done(deaths=count)
