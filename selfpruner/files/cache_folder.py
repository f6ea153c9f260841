"""The cache folder: what it keeps, for which model, how large, last used when; how it is bounded and cleaned.

    CACHE/models/NAME       folders converted from GGUF files         CACHE/factors/NAME    orders and repairs of a criterion
    CACHE/statistics/NAME   moments and gradients of a model's inputs  CACHE/levels/NAME     matrices at every sparsity
    CACHE/texts/NAME        token ids of texts, and what models wrote  CACHE/spectra, latency, datasets
    CACHE/used/KIND-NAME.json   whose it is; its time is that of the last use, and whoever uses the entry holds a lock on it

An entry that a process uses (:func:`use`) is never removed by another. The lock is the system's and goes with the process, however
that ends. To stay within ``SELFPRUNER_CACHE_LIMIT``, entries of the large kinds go in the order of last use. Texts and times stay:
they are small, and a resumed job needs those it began with.

Standard library and pydantic only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from selfpruner.config import Bytes
from selfpruner.errors import ConfigError
from selfpruner.files import places

KINDS = ("models", "texts", "statistics", "factors", "levels", "spectra", "latency", "datasets")
LARGE = ("models", "statistics", "factors", "levels", "datasets")
LIMIT = "SELFPRUNER_CACHE_LIMIT"
_MARKS = "used"
# Age of a file that a killed process was writing: nobody writes one file for so long.
_LEFTOVER_SECONDS = 24 * 3600

_held: dict[Path, int] = {}  # the entries this process uses, and the descriptors of their marks


def default_cache() -> Path:
    """Where models, texts and statistics are kept: ``$SELFPRUNER_CACHE``, else ``~/.cache/selfpruner``."""
    return Path(os.environ.get("SELFPRUNER_CACHE") or Path.home() / ".cache" / "selfpruner")


def limit() -> int | None:
    """``$SELFPRUNER_CACHE_LIMIT`` in bytes, None where there is none. Raises ConfigError."""
    given = os.environ.get(LIMIT)
    if not given:
        return None
    try:
        return TypeAdapter(Bytes).validate_python(given)
    except ValidationError:
        raise ConfigError(f"{LIMIT} is {given!r}: give bytes, or a size such as 20GiB.", param="cache_limit") from None


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """``used`` in seconds since 1970; ``model`` and ``what`` are empty where an older version kept it."""

    kind: str
    path: Path
    bytes: int
    used: float
    model: str = ""
    what: str = ""


def use(entry: Path, model: str, what: str) -> None:
    """Keep ``entry``, which exists or is about to, from being removed until :func:`let_go`. Call it before looking for the entry.
    A folder that cannot be written needs none of this."""
    mark = _mark(entry)
    with contextlib.suppress(OSError):
        if entry not in _held:
            mark.parent.mkdir(parents=True, exist_ok=True)
            _held[entry] = _locked(mark, fcntl.LOCK_SH)
        about = json.dumps({"model": model, "what": what})
        if mark.read_text() != about:
            mark.write_text(about)
        os.utime(mark)


def let_go(*, keep: Collection[Path] = ()) -> None:
    """This process no longer uses anything except the entries in ``keep``."""
    for entry in [entry for entry in _held if entry not in keep]:
        os.close(_held.pop(entry))


def entries(cache: Path) -> list[CacheEntry]:
    """All entries, the longest unused first."""
    listed = []
    for kind in KINDS:
        for path in _listed(cache / kind):
            if path.suffix in (".lock", ".tmp"):
                continue
            about, used = {}, None
            with contextlib.suppress(OSError, ValueError):
                mark = _mark(path)
                used = mark.stat().st_mtime
                about = json.loads(mark.read_text())
            with contextlib.suppress(OSError):  # another process may be removing it
                used = path.stat().st_mtime if used is None else used
                listed.append(CacheEntry(kind, path, _size(path), used, about.get("model", ""), about.get("what", "")))
    return sorted(listed, key=lambda entry: entry.used)


def remove(entry: CacheEntry) -> bool:
    """Whether the entry is gone; it stays where another process, or this one, uses it. Raises OSError."""
    mark = _mark(entry.path)
    mark.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _locked(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        if entry.path.is_dir():
            # Under another name first: half an entry must not pass for one.
            aside = entry.path.with_name(f"{entry.path.name}.{os.getpid()}.tmp")
            entry.path.rename(aside)
            shutil.rmtree(aside)
        else:
            entry.path.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    return True


def discard(entry: Path) -> None:
    """Remove an entry that this process made for a single use; it stays where another process uses it too."""
    if entry in _held:
        os.close(_held.pop(entry))
    with contextlib.suppress(OSError):
        remove(CacheEntry(entry.parent.name, entry, 0, 0.0))


def clean(cache: Path, *, kinds: Collection[str] = KINDS, older_than: float = 0.0) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove entries of ``kinds`` that were not used for so many seconds, and what killed processes left: (removed, in use)."""
    now = time.time()
    removed: list[CacheEntry] = []
    kept: list[CacheEntry] = []
    for entry in entries(cache):
        if entry.kind in kinds and now - entry.used >= older_than:
            (removed if remove(entry) else kept).append(entry)
    for leftover in cache.glob("**/*.tmp"):
        with contextlib.suppress(OSError):
            if now - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return removed, kept


def make_room(cache: Path, needed: int, tell: Callable[[str], None]) -> None:
    """Remove what was not used for longest until ``needed`` bytes more are within the limit, and say so.

    Entries in use stay; if they are too large, that is said. Raises ConfigError for a limit that is no size, DiskFullError
    where the disk has less.
    """
    most = limit()
    present = entries(cache)
    total, freed = sum(entry.bytes for entry in present), 0
    if most is not None:
        for entry in present:
            if total - freed + needed <= most:
                break
            if entry.kind in LARGE and remove(entry):
                freed += entry.bytes
        if freed:
            tell(f"removed {size(freed)} from {cache} that were not used for longest, to stay within {LIMIT}={size(most)}")
        if total - freed + needed > most:
            tell(f"{cache} will hold {size(total - freed + needed)}, more than {LIMIT} allows ({size(most)}): all of it is in use")
    if needed:
        places.room_for(needed, cache, "What preparing keeps (selfpruner cache lists and cleans it)")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _mark(entry: Path) -> Path:
    return entry.parent.parent / _MARKS / f"{entry.parent.name}-{entry.name}.json"


def _locked(mark: Path, how: int) -> int:
    """A descriptor of the file, locked. If someone removed the file meanwhile, the lock is on nothing: try again."""
    while True:
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, how)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), mark.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _listed(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield from sorted(folder.iterdir())


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += 0 if file.is_dir() else file.lstat().st_size
    return total
