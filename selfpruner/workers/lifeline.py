"""No process outlives the one that started it, however that one ended.

    python -P .../lifeline.py PARENT [-P] -m MODULE [ARGUMENTS]    what ``python [-P] -m MODULE ...`` does, while PARENT lives
    python -P .../lifeline.py PARENT [-P] FILE [ARGUMENTS]         the same for a script

Everything in this product that starts a process does so by :func:`tied`: workers, verifications, quantising, the demo's server. A
killed parent cannot end its children, so the child looks: once its parent is another process, the one that started it is gone. That
needs no pipe, which a third process might hold open, and works the same on Linux and macOS.

Standard library only, and run by its path, so a process that must not import selfpruner does not.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_LOOK = 0.25  # seconds
# Seconds for an orderly end: a server's own limit (``shutdown_seconds``) and what comes after it.
_GRACE = 15.0


def tied(*arguments: str, python: str = sys.executable) -> list[str]:
    """The command that does what ``python *arguments`` does, for as long as this process lives."""
    return [python, "-P", __file__, str(os.getpid()), *arguments]


def hold(parent: int) -> None:
    """End this process, within a second, when ``parent`` is no longer what it belongs to.

    The leader of a group ends at once with all its group. Another process gets a SIGTERM, and is killed if that does not help.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="lifeline").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    parent, *rest = arguments
    hold(int(parent))
    safe = rest[0] == "-P"
    kind, *rest = rest[safe:]
    where = str(Path.cwd()) if kind == "-m" else str(Path(kind).parent)
    if not safe:
        sys.path.insert(0, where)
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
