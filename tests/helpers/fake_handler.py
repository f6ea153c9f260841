"""A TaskRuntime without a model: what a worker pool has to cope with, one task kind each. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfpruner.errors import CancelledTaskError, ProposerError, UnsupportedModelError
from selfpruner.workers.base import Session


class FakeHandler:
    def __init__(self, device: str) -> None:
        self.device = device
        self.sessions: list[str] = []

    def handle(
        self,
        session: Session,
        kind: str,
        payload: Mapping[str, Any],
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> dict[str, Any]:
        if not self.sessions or self.sessions[-1] != session.key:
            self.sessions.append(session.key)
        self.progress, self.cancelled = progress, cancelled
        result = getattr(self, kind)(payload)
        return {"device": self.device, "pid": os.getpid(), "sessions": self.sessions, **result}

    def echo(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        for text in payload.get("say", []):
            self.progress(text)
        return {"echo": dict(payload)}

    def note(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Sleep in small steps, then append a line to a file: shows whether a task ran to its end, and how often."""
        end = time.monotonic() + payload["seconds"]
        self.progress("started")
        while time.monotonic() < end:
            if self.cancelled():
                raise CancelledTaskError("stopped as asked")
            time.sleep(0.01)
        with Path(payload["file"]).open("a") as file:
            file.write(f"{payload['text']}\n")
        return {"text": payload["text"], "started": end - payload["seconds"], "ended": time.monotonic()}

    def stubborn(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self.progress("started")
        time.sleep(60)
        return {}

    def noisy(self, _: Mapping[str, Any]) -> dict[str, Any]:
        print('{"op": "result", "id": 1, "result": {}}')
        os.write(1, b"raw bytes on descriptor 1\n")
        subprocess.run([sys.executable, "-c", "import sys; print('grandchild', sys.stdin.read())"], check=True)
        return {}

    def grandchild(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self.progress(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
        return {}

    def fail(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        match payload["how"]:
            case "typed":
                raise UnsupportedModelError("no adapter for this; use llama", param="model")
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
            case "not json":
                return {"value": object()}
        raise AssertionError(payload)

    def crash(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Die as told, as long as fewer than ``times`` deaths are noted in ``file``."""
        deaths = Path(payload["file"])
        count = len(deaths.read_text()) if deaths.exists() else 0
        if count < payload["times"]:
            deaths.write_text("x" * (count + 1))
            print("last words", file=sys.stderr, flush=True)
            if payload["how"] == "exit":
                os._exit(7)
            os.kill(os.getpid(), signal.Signals[payload["how"]])
        return {"deaths": count}
