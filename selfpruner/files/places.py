"""Look at where results go before anything costs time: may this folder or file be written, and is there room?

Imports no torch. Nothing is left behind, and no folder is made.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from selfpruner.errors import ConfigError, DiskFullError, disk_errors

# For other writers meanwhile, and for the disk's own needs.
SPARE = 64 << 20


def writable_folder(folder: Path, *, param: str = "output") -> None:
    """Raises ConfigError where ``folder`` is no folder, NoPermissionError where it, or what it would be made in, cannot be written,
    and DiskFullError for a full disk."""
    try:
        str(folder).encode()  # in SQLite, JSON and safetensors a path is UTF-8
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            folder.expanduser().lstat()  # what _nearest asks is silent of names that are too long
        nearest = _nearest(folder)
    except UnicodeEncodeError as error:
        raise ConfigError(f"The name {str(folder)!a} is not UTF-8. Name another folder.", param=param) from error
    except (OSError, ValueError) as error:  # a name too long, a null byte
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{str(folder)[:100]!r} cannot be made: {why}. Name another folder.", param=param) from error
    if not nearest.is_dir():
        what = f"{folder} is a file" if nearest == folder else f"{folder} cannot be made, because {nearest} is a file"
        raise ConfigError(f"{what}; name a folder.", param=param)
    # A look at the mode bits says nothing of disks that can only be read, quotas and lists of who may write.
    try:
        with disk_errors(nearest):
            try:
                with tempfile.TemporaryDirectory(prefix=".tmp-", dir=nearest):
                    pass
            except OSError as error:
                error.filename = str(folder if folder.exists() else nearest)  # not our attempt's
                raise
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}. Name another folder.", param=param) from error


def writable_file(file: Path, *, param: str = "output") -> None:
    """The same for a file that will be replaced."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name a file in it.", param=param)
    if file.exists() and not file.is_file():  # a device, a pipe: replaced, it would be gone
        raise ConfigError(f"{file} is no ordinary file; name another.", param=param)
    writable_folder(Path(os.path.realpath(file)).parent, param=param)


def room_for(size: int, folder: Path, what: str) -> None:
    """Raises DiskFullError where the disk of ``folder`` has less than ``size`` bytes and SPARE left for ``what``."""
    free = shutil.disk_usage(_nearest(folder)).free
    if size + SPARE > free:
        raise DiskFullError(
            f"{what} will take about {mib(size)} in {folder}, and only {mib(free)} are free there. Free some, or "
            "name another place."
        )


def _nearest(place: Path) -> Path:
    """``place``, or its nearest parent that exists."""
    folder = Path(os.path.realpath(place.expanduser()))
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def mib(size: int) -> str:
    """A number of bytes for people; less than one MiB is not none."""
    return f"{size / (1 << 20):,.0f} MiB" if size >= 1 << 20 else f"{size:,} bytes"
