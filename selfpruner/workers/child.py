"""The worker process: reads tasks, one JSON object a line, runs them one at a time, writes replies the same way.

    python -m selfpruner.workers.child --handler package.module:Class --device cpu --heartbeat 5

    in   {op: "task", id, session: {key, config, cache}, kind, payload}
         {op: "cancel", id}
    out  {op: "heartbeat"}                      every --heartbeat seconds, while Python runs at all
         {op: "progress", id, text, foreseen}    foreseen: whether it is a progress.Foreseen
         {op: "result", id, result}
         {op: "error", id, error}               error as in errors.to_dict, and its class

The pipes are moved away from descriptors 0 and 1 before anything else is imported: a library that prints goes to the log
(descriptor 2), a grandchild that reads gets nothing. End of input means that the parent is gone; then this process and all
it started end at once.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import BinaryIO, Literal, NoReturn, NotRequired, TypedDict

from pydantic import JsonValue

from selfpruner.errors import CancelledTaskError
from selfpruner.progress import Foreseen
from selfpruner.workers.base import Session, TaskHandler, perform
from selfpruner.workers.failures import is_expected, to_wire


class SessionFields(TypedDict):
    key: str
    config: dict[str, JsonValue]
    cache: str
    plan: NotRequired[list[int] | None]


class TaskMessage(TypedDict):
    op: Literal["task"]
    id: int
    session: SessionFields
    kind: str
    payload: JsonValue


class Child:
    """The three threads of a worker: the main one runs tasks, one reads, one beats."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, handler: str, device: str) -> None:
        self._source = source
        self._sink = sink
        self._handler_path = handler
        self._device = device
        self._handler: TaskHandler | None = None
        self._tasks: queue.Queue[TaskMessage] = queue.Queue()
        self._cancelled: set[int] = set()
        self._writing = threading.Lock()

    def serve(self, heartbeat: float) -> NoReturn:
        threading.Thread(target=self._read, daemon=True, name="reader").start()
        threading.Thread(target=self._beat, args=(heartbeat,), daemon=True, name="heartbeat").start()
        while True:
            self._perform(self._tasks.get())

    def _read(self) -> None:
        try:
            for line in self._source:
                message = json.loads(line)
                if message["op"] == "cancel":
                    self._cancelled.add(message["id"])
                else:
                    self._tasks.put(message)
        finally:
            _leave()

    def _beat(self, seconds: float) -> None:
        while True:
            self._write({"op": "heartbeat"})
            time.sleep(seconds)

    def _perform(self, task: TaskMessage) -> None:
        number = task["id"]
        try:
            line = _line({"op": "result", "id": number, "result": self._handle(task)})
        except BaseException as error:  # also SystemExit: no task may end the worker by accident
            if not is_expected(error):
                traceback.print_exc()
            line = _line({"op": "error", "id": number, "error": to_wire(error)})
        self._cancelled.discard(number)
        self._write_line(line)

    def _handle(self, task: TaskMessage) -> dict[str, JsonValue]:
        number = task["id"]
        if number in self._cancelled:
            raise CancelledTaskError("The task was cancelled before it started.")
        if self._handler is None:
            self._handler = load_handler(self._handler_path, self._device)
        return perform(
            self._handler,
            Session(**task["session"]),
            task["kind"],
            task["payload"],
            lambda text: self._write({"op": "progress", "id": number, "text": text, "foreseen": isinstance(text, Foreseen)}),
            lambda: number in self._cancelled,
        )

    def _write(self, message: Mapping[str, object]) -> None:
        self._write_line(_line(message))

    def _write_line(self, line: bytes) -> None:
        try:
            with self._writing:
                self._sink.write(line)
                self._sink.flush()
        except OSError:
            _leave()


def load_handler(path: str, device: str) -> TaskHandler:
    """Import ``package.module:Class`` and construct it with the device."""
    module, _, name = path.partition(":")
    handler: TaskHandler = getattr(importlib.import_module(module), name)(device=device)
    return handler


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _leave() -> NoReturn:
    """End now, with everything this process started; the parent made it the leader of its own group."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def main() -> NoReturn:
    parser = argparse.ArgumentParser(
        prog="selfpruner.workers.child", description="A worker process; started by the pool, not by hand."
    )
    parser.add_argument("--handler", required=True, help="package.module:Class, a TaskHandler")
    parser.add_argument("--device", required=True)
    parser.add_argument("--heartbeat", type=float, required=True, help="seconds between two signs of life")
    arguments = parser.parse_args()

    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable()  # a crash in native code leaves its Python stack in the log
    Child(source, sink, arguments.handler, arguments.device).serve(arguments.heartbeat)


if __name__ == "__main__":
    main()
