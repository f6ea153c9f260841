"""A folder that is complete or not there: written aside, proven, listed in its manifest, and only then renamed into place.

It is written beside its place under a name that begins with ``.tmp-``. So a killed writer leaves nothing visible, and the next
writer sweeps up what it left.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from selfpruner.config import differences
from selfpruner.errors import ConflictError, ExportError, SelfprunerError, disk_errors
from selfpruner.files import manifest, places
from selfpruner.files.atomic import sync
from selfpruner.files.manifest import ExportFacts, Manifest, PlanFile, Verification
from selfpruner.files.scratch import another, scratch
from selfpruner.progress import OnProgress
from selfpruner.stages import at

WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True, slots=True)
class Exported:
    """A complete, verified export. ``bytes`` are those of its weight files; ``reused``: it was there already."""

    path: Path
    parameters: int
    bytes: int
    manifest_sha256: str
    verification: Verification
    write_seconds: float = 0.0
    verify_seconds: float = 0.0
    reused: bool = False


def write_folder(
    directory: Path,
    *,
    plan: PlanFile,
    export: ExportFacts,
    fill: Callable[[Path], int],
    prove: Callable[[Path], Verification],
    go_on: Callable[[], None],
    progress: OnProgress = lambda _: None,
) -> Exported:
    """Make ``directory``: ``fill`` writes its files and returns its parameters, ``prove`` looks at them and raises or returns
    what it found.

    ``plan`` and ``export`` (the format, and what it was made from) are what it is: a complete folder that has both is kept, an
    incomplete or corrupt one is replaced. ``go_on`` may raise. Raises ExportError when ``directory`` holds something else, or for
    whatever stops ``fill``, and DiskFullError. Nothing is left behind then.
    """
    directory = Path(os.path.abspath(directory))
    if kept := _existing(directory, plan, export, go_on):
        return kept
    # A link, say to a larger disk, stays one: its target is made or replaced.
    target = Path(os.path.realpath(directory))
    with aside(target) as temporary:
        started = time.perf_counter()
        progress("writing the files")
        parameters = fill(temporary)
        for path in temporary.rglob("*"):
            sync(path)
        written = time.perf_counter()
        progress("loading them in a fresh process and comparing")
        with at("verification"):
            verification = prove(temporary)
        verified = time.perf_counter()
        go_on()
        digest = manifest.write(temporary, plan=plan, parameters=parameters, verification=verification, export=export)
        size = _weight_bytes(manifest.read(temporary))
        _into_place(temporary, target)
    return Exported(directory, parameters, size, digest, verification, round(written - started, 2), round(verified - written, 2))


def refuse_place(directory: Path, made_of: Mapping[str, object] | None = None) -> None:
    """Raise, before anything is computed, what :func:`write_folder` would in the end: for a folder that cannot be written or holds
    something else, and with ``made_of`` (what is known of the new plan.json) for one with another checkpoint."""
    places.writable_folder(directory)
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not (directory / "plan.json").is_file():
        raise _foreign(directory)
    if made_of is None or not (directory / manifest.NAME).is_file():
        return
    try:
        plan = manifest.read(directory)["plan"]
    except ExportError:
        return  # a corrupt one is replaced
    if changed := differences({key: value for key, value in plan.items() if key in made_of}, made_of):
        raise ConflictError(
            f"{directory} already holds a checkpoint made otherwise: {'; '.join(changed)}. Choose another folder or remove it.",
            code="other_settings",
            param="output",
        )


def _foreign(directory: Path) -> ExportError:
    return ExportError(f"{directory} is not empty and no checkpoint of selfpruner; choose another folder.")


@contextmanager
def aside(directory: Path) -> Iterator[Path]:
    """A new folder beside ``directory`` that is gone afterwards, and swept up by the next writer here if this process is killed.

    What the operating system or a library raises inside becomes an ExportError or DiskFullError.
    """
    with _export_errors(directory), disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with scratch(directory.parent, f".tmp-{directory.name}", sweep=".tmp-") as temporary:
            yield temporary


def _existing(directory: Path, plan: PlanFile, export: ExportFacts, go_on: Callable[[], None]) -> Exported | None:
    """The export in ``directory`` if it is complete and the same; None when the place is free or may be overwritten."""
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file; choose a folder for the checkpoint.")
    try:
        body = manifest.check(directory, go_on)
    except ExportError as error:
        if any(directory.iterdir()) and not (directory / "plan.json").is_file():
            raise _foreign(directory) from error
        return None
    if body["plan"] != plan or body["export"] != export:
        other = "plan" if body["plan"] != plan else "format"
        raise ExportError(f"{directory} already holds a checkpoint of another {other}; choose another folder or remove it.")
    digest = manifest.sha256(directory / manifest.NAME)
    return Exported(directory, body["parameters"], _weight_bytes(body), digest, body["verification"], reused=True)


def _weight_bytes(body: Manifest) -> int:
    return sum(entry["bytes"] for name, entry in body["files"].items() if "/" not in name and name.endswith(WEIGHTS))


def _into_place(temporary: Path, directory: Path) -> None:
    if directory.exists():
        old = another(directory.with_name(f".tmp-{directory.name}"))
        directory.rename(old)
        temporary.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(directory)
    sync(directory.parent)


@contextmanager
def _export_errors(directory: Path) -> Iterator[None]:
    """Turn what the operating system or a library raises under this block into ExportError."""
    try:
        yield
    except SelfprunerError:
        raise
    except Exception as error:
        raise ExportError(f"The checkpoint could not be written to {directory}: {error}") from error
