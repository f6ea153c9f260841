"""Files that are whole or not there: written beside their place and renamed. Imports no torch.

A killed writer leaves a ``*.tmp`` file, which ``selfpruner cache clean`` sweeps up.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfpruner.errors import disk_errors


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to. It takes the place of ``file`` when the block ends, and is removed when the block raises.

    Raises DiskFullError and NoPermissionError.
    """
    target = file.resolve()  # a link stays one
    aside = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    with disk_errors(file):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write ``text`` to ``file`` as UTF-8."""
    with replacing(file) as aside:
        aside.write_text(text, "utf-8")


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
