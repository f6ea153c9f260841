"""Folders for the time of some work, named by who made them: what a killed process left is swept up by the next one."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(parent: Path, name: str, *, sweep: str) -> Iterator[Path]:
    """A new folder in ``parent`` whose name begins with ``name``, and that is gone afterwards. What dead processes of this machine
    left there under names that begin with ``sweep`` goes first."""
    for left in parent.glob(f"{sweep}*"):
        _remove_if_left(left)
    folder = another(parent / name)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def another(place: Path) -> Path:
    """A free name in the place's folder that says which process took it."""
    return place.with_name(f"{place.name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_if_left(folder: Path) -> None:
    *_, host, pid, token = ["", "", *folder.name.rsplit("-", 2)]
    # The host name may itself contain dashes, so it is compared as the end of what is left.
    if len(token) == 8 and pid.isdecimal() and host.endswith(f"-{socket.gethostname()}") and not _alive(int(pid)):
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
