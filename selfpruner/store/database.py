"""The SQLite file under the store: connections, transactions, the writer's lock, and SQLite's errors as ours.

- WAL with ``synchronous=FULL``: what was committed is on disk. Foreign keys are enforced.
- We begin transactions ourselves, not pysqlite: ``BEGIN IMMEDIATE`` for writes, because a transaction that reads and then writes
  fails with BUSY_SNAPSHOT whatever the timeout; ``BEGIN`` for reads, which see one consistent state.
- One process writes. It holds an exclusive lock on ``<database>.lock`` as long as it lives; the operating system releases it when
  the process dies. Readers (``read_only=True``) take no lock and are never blocked.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, QueuePool, create_engine, event
from sqlalchemy.exc import DBAPIError, StatementError
from sqlmodel import Session

from selfpruner.errors import DiskFullError, SelfprunerError, StoreError
from selfpruner.store import schema

BUSY_SECONDS = 10.0
PRAGMAS = (f"busy_timeout = {int(BUSY_SECONDS * 1000)}", "foreign_keys = ON", "synchronous = FULL")


class Database:
    """An open database whose schema is the current one. Threads may share it; a forked child may not.

    Raises StoreError when the file is not ours, is damaged or newer than this program, or another process writes it;
    DiskFullError when there is no space for it.
    """

    def __init__(self, path: Path | str, *, read_only: bool = False) -> None:
        self.path = Path(path).absolute()
        self.read_only = read_only
        self._writing = threading.Lock()
        self._lock: FileLock | None = None
        if read_only and not self.path.is_file():
            raise StoreError(f"There is no database at {self.path}. Start the server once to make it, or name the right file.")
        if not read_only:
            self._lock = _take_lock(self.path)
        self._engine = _engine(self.path, read_only)
        self._writer = self._engine.execution_options(begin="IMMEDIATE")
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection and let the next writer in. Closing twice is harmless."""
        self._engine.dispose()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def is_written(self) -> bool:
        """Whether a process has this file open for writing, this one perhaps. Changes nothing."""
        try:
            lock = os.open(_lock_of(self.path), os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A short read transaction. Rows stay usable after it."""
        with self._errors(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A short write transaction: committed, and on disk, when the block ends; rolled back when it raises."""
        if self.read_only:
            raise StoreError(f"{self.path} was opened for reading. Send the change to the server that owns it.")
        with self._errors(), self._writing, Session(self._writer, expire_on_commit=False) as session:
            yield session
            session.commit()

    def _prepare(self) -> None:
        with self._engine.connect() as connection:
            revision = schema.revision(connection, self.path)
        if self.read_only:
            schema.require_current(revision, self.path)
            return
        with self._engine.connect().execution_options(begin=None) as connection:
            mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar()
            if mode != "wal":
                raise StoreError(f"The file system of {self.path} does not support SQLite's WAL. Put the database on a local disk.")
            # Rebuilding a table drops the old one, and with foreign keys on that would take the rows that refer to it along.
            connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            schema.bring_up_to_date(connection, revision)
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA foreign_keys = ON")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise translated(error.orig, self.path) from error
        except StatementError as error:
            # A value that JSON or SQLite cannot hold: NaN inside a JSON column, an integer beyond 64 bits.
            raise StoreError(f"The database {self.path} cannot hold this value: {error.orig}") from error
        except OverflowError as error:
            raise StoreError(f"The database {self.path} cannot hold this value: {error}") from error


def translated(error: BaseException | None, path: Path) -> SelfprunerError:
    """SQLite's error as one of ours, saying what to do next."""
    name = str(getattr(error, "sqlite_errorname", ""))
    if name.startswith("SQLITE_FULL") or (name.startswith("SQLITE_IOERR") and _no_space(path)):
        return DiskFullError(f"No space left while writing {path}. Free some space and resume the job.")
    if name.startswith("SQLITE_NOTADB"):
        return StoreError(f"{path} is not an SQLite database. Name another file, or move this one away.", code="store_foreign")
    if name.startswith("SQLITE_CORRUPT") or "malformed" in str(error):
        return StoreError(
            f"The database {path} is damaged ({error}). Restore a backup, or save what can be read with "
            f"`sqlite3 {path} .recover | sqlite3 recovered.db` and use that file.",
            code="store_corrupt",
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreError(
            f"The database {path} was locked by another program for {BUSY_SECONDS:.0f} s. Close what writes to it (an open "
            "transaction in the sqlite3 shell, a backup) and try again.",
            code="store_busy",
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return StoreError(
            f"The database {path} cannot be written or opened ({error}). Check the permissions of the file and its folder."
        )
    if name.startswith("SQLITE_CONSTRAINT"):
        return StoreError(f"The database refused an impossible row ({error}). This is a bug in the program that wrote it.")
    return StoreError(f"The database {path} failed: {error}. Check the disk, then start again.")


def _no_space(path: Path) -> bool:
    """SQLite reports some writes that failed for want of space as plain I/O errors."""
    try:
        return shutil.disk_usage(path.parent).free < 1 << 20
    except OSError:
        return False


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _take_lock(path: Path) -> FileLock:
    place = _lock_of(path)
    # Whoever closes the database lets go, in whatever thread; a lock that a file system lacks is not replaced by a weaker one.
    lock = FileLock(place, mode=0o600, thread_local=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2, poll_interval=0.02)  # somebody who looks whether it is held has it for a moment
    except Timeout as error:
        holder = place.read_text(errors="replace").strip() or "unknown"
        raise StoreError(
            f"Another process (pid {holder}) writes {path}. Wait until it has finished, or stop it; a server is asked over HTTP, "
            f"and a search is watched with `selfpruner show -f {path.parent}`.",
            code="store_locked",
        ) from error
    except OSError as error:
        raise StoreError(f"Cannot create {place}: {error.strerror}. Choose a folder you may write to.") from error
    with suppress(OSError):  # the number only serves the message above; a full disk must not keep the server from starting
        place.write_text(f"{os.getpid()}\n")
    return lock


def _to_json(value: object) -> str:
    """Readable in the sqlite3 shell, never NaN, and half a surrogate pair from a broken LLM reply becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace").decode()


def _reading(path: Path) -> str:
    """How SQLite opens a file to read it. Beside one in WAL mode it writes an index; where it may not, as on a disk that can only
    be read, it takes the index that is there, or the file as it is, which then nobody changes."""
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return "mode=rw"
    return "mode=ro" if path.with_name(path.name + "-wal").exists() else "immutable=1"


def _engine(path: Path, read_only: bool) -> Engine:
    mode = _reading(path) if read_only else "mode=rwc"
    engine = create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(
            f"{path.as_uri()}?{mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        ),
        json_serializer=_to_json,
        poolclass=QueuePool,
        pool_size=4,
        max_overflow=-1,
    )

    def configure(connection: sqlite3.Connection, _record: object) -> None:
        for pragma in (*PRAGMAS, *(("query_only = ON",) if read_only else ())):
            connection.execute(f"PRAGMA {pragma}")

    def begin(connection: Connection) -> None:
        kind = connection.get_execution_options().get("begin", "DEFERRED")
        if kind is not None:
            connection.exec_driver_sql(f"BEGIN {kind}")

    event.listen(engine, "connect", configure)
    event.listen(engine, "begin", begin)
    return engine
