"""The schema's history: migrations give the same tables as the models, old files open, foreign and newer ones are refused."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

import selfpruner.store
from selfpruner.config import SearchConfig
from selfpruner.errors import StoreError
from selfpruner.records import Evaluation
from selfpruner.store import schema
from selfpruner.store.recorder import JobRecorder
from selfpruner.store.store import Store
from selfpruner.store.tables import REVISION, Table
from tests.helpers import GOLDEN

DATABASES = sorted(GOLDEN.glob("store_*.sql"))
STORE_FOLDER = Path(selfpruner.store.__file__).parent


def restored(dump: Path, path: Path) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(dump.read_text(encoding="utf-8"))
    return path


def objects(path: Path) -> dict[str, str]:
    """Every table, index and view with its SQL, spaces and quotes aside."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        return {name: re.sub(r'[\s"]', "", sql) for name, sql in rows}


def migrated_from_nothing(path: Path) -> Path:
    """A database made by the migrations alone, as a chain of releases would have made it."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        schema._migrate(connection)
        schema._make_views(connection)
    engine.dispose()
    return path


def test_migrations_and_tables_make_the_same_database(tmp_path: Path) -> None:
    Store(tmp_path / "fresh.db").close()
    assert objects(migrated_from_nothing(tmp_path / "migrated.db")) == objects(tmp_path / "fresh.db")
    engine = create_engine(f"sqlite:///{tmp_path / 'migrated.db'}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Table.metadata) == []
        assert context.get_current_revision() == REVISION
    engine.dispose()
    assert ScriptDirectory(str(STORE_FOLDER / "migrations")).get_heads() == [REVISION]


def test_every_view_of_the_file_is_made(tmp_path: Path) -> None:
    assert list(schema.views()) == [
        "newest",
        "ranking",
        "population",
        "best",
        "lineage",
        "operator_report",
        "foresight",
        "llm_cost",
    ]
    Store(tmp_path / "store.db").close()
    assert schema.views().keys() <= objects(tmp_path / "store.db").keys()


@pytest.mark.parametrize("dump", DATABASES, ids=lambda dump: dump.stem)
def test_an_old_database_opens_with_everything_in_it(dump: Path, tmp_path: Path) -> None:
    path = restored(dump, tmp_path / "old.db")
    with Store(path) as store:
        waiting, failed, done = store.jobs().data
        assert [(job.owner, job.status) for job in (waiting, failed, done)] == [
            ("bob", "queued"), ("bob", "failed"), ("ada", "succeeded")
        ]  # fmt: skip
        assert done.user_metadata == {"team": "naïve 🦙"}
        assert failed.error is not None
        assert failed.error["code"] == "worker_failed"
        assert SearchConfig.model_validate(done.config).rate == 0.2
        assert done.progress is not None
        assert done.progress["best_plan"] == "bbbb"
        rows = store.candidates(done.id, order="fitness").data
        assert [(row.plan_hash, row.status, row.parents) for row in rows] == [
            ("bbbb", "evaluated", ["aaaa"]),
            ("aaaa", "evaluated", []),
            ("cccc", "infeasible", ["aaaa", "bbbb"]),
        ]
        assert rows[0].rates == [0.125, 0.21875]
        beliefs = [(row.predicted, row.credit, row.informed_by) for row in rows]
        assert beliefs == [(0.875, 0.00025, 0) if dump.stem >= "store_0002" else (None, None, None), *[(None, None, None)] * 2]
        recorder = store.recorder(done.id)
        assert recorder.find_evaluation("bbbb", "w1") == Evaluation("bbbb", "w1", 3072, 0.27, 3.4, 0.5)
        assert [call.outcome for call in store.llm_calls(done.id)] == ["ok", "timeout"]
        assert [event.sequence for event in store.events(done.id).data] == [1, 2, 3, 4]
        assert [checkpoint.metrics for checkpoint in store.checkpoints(done.id)] == [{"kl": 0.27}]
        store.transition(waiting.id, "running")
    assert objects(path) == objects(migrated_from_nothing(tmp_path / "fresh.db"))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT plan, relative FROM best").fetchall() == [("bbbb", 0.9)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_views_follow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("DROP VIEW best; CREATE VIEW best AS SELECT 1 AS one; CREATE VIEW retired AS SELECT 2 AS two;")
    before = objects(path)
    Store(path).close()
    after = objects(path)
    assert after["best"] != before["best"]
    assert "retired" not in after


NEXT_REVISION = """
import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade():
    with op.batch_alter_table("job", recreate="always") as batch:
        batch.add_column(sa.Column("note", sa.String(), nullable=False, server_default="none"))
    {then}
"""


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretend that a release with revision 0003, which rebuilds the table every other table refers to, is running."""

    def install(then: str) -> None:
        folder = tmp_path / "release"
        shutil.copytree(STORE_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "migrations/versions/v0003_note.py").write_text(NEXT_REVISION.format(then=then))
        monkeypatch.setattr(schema, "files", lambda _: folder)
        monkeypatch.setattr(schema, "REVISION", "0003")

    return install


@pytest.mark.parametrize("dump", DATABASES, ids=lambda dump: dump.stem)
def test_a_migration_keeps_every_row(dump: Path, tmp_path: Path, next_release: Callable[[str], None]) -> None:
    path = restored(dump, tmp_path / "old.db")
    counts = "SELECT (SELECT count(*) FROM job), (SELECT count(*) FROM candidate), (SELECT count(*) FROM event)"
    with closing(sqlite3.connect(path)) as connection:
        before = connection.execute(counts).fetchall()
    next_release("pass")
    with pytest.raises(StoreError, match="Start the server on it once") as error:
        Store(path, read_only=True)
    assert error.value.code == "store_older"
    with Store(path) as store:
        assert [job.status for job in store.jobs().data] == ["queued", "failed", "succeeded"]
        # Foreign keys are enforced again on the connection that migrated.
        with pytest.raises(StoreError, match="FOREIGN KEY"):
            JobRecorder(store._database, store._transaction, "nobody").save_evaluations([Evaluation("a", "w", 1, 0.1, 3.0, 0.1)])
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(counts).fetchall() == before
        assert connection.execute("SELECT DISTINCT note FROM job").fetchall() == [("none",)]
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0003",)]
        assert connection.execute("SELECT plan FROM best").fetchall() == [("bbbb",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.mark.parametrize("dump", DATABASES, ids=lambda dump: dump.stem)
@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ("op.execute('INSERT INTO nowhere VALUES (1)')", "no such table: nowhere"),
        ("op.execute('DELETE FROM job')", "left rows without their job"),
    ],
)
def test_a_migration_that_fails_leaves_the_file_as_it_was(
    then: str, expected: str, dump: Path, tmp_path: Path, next_release: Callable[[str], None]
) -> None:
    path = restored(dump, tmp_path / "old.db")
    before = objects(path)
    next_release(then)
    with pytest.raises(StoreError, match=expected):
        Store(path)
    assert objects(path) == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(dump.stem[-4:],)]
        assert connection.execute("SELECT count(*) FROM job").fetchall() == [(3,)]


def test_files_that_are_not_ours_are_refused_and_left_alone(tmp_path: Path) -> None:
    text, foreign, newer = tmp_path / "notes.txt", tmp_path / "foreign.db", tmp_path / "newer.db"
    text.write_text("these are notes, not a database, and there are more than enough of them " * 50)
    with closing(sqlite3.connect(foreign)) as connection:
        connection.executescript("CREATE TABLE alembic_version (version_num TEXT); CREATE TABLE recipes (name TEXT);")
    Store(newer).close()
    with closing(sqlite3.connect(newer)) as connection:
        connection.executescript("UPDATE alembic_version SET version_num = '9999'")
    for path, code, advice in (
        (text, "store_foreign", "Name another file"),
        (foreign, "store_foreign", "Name another file"),
        (newer, "store_newer", "Upgrade selfpruner"),
    ):
        before = path.read_bytes()
        for read_only in (False, True):
            with pytest.raises(StoreError, match=advice) as error:
                Store(path, read_only=read_only)
            assert error.value.code == code
        assert path.read_bytes() == before


def test_a_reader_needs_a_database(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no database"):
        Store(tmp_path / "none.db", read_only=True)
    (tmp_path / "empty.db").touch()
    with pytest.raises(StoreError, match="has schema none"):
        Store(tmp_path / "empty.db", read_only=True)
    assert (tmp_path / "empty.db").stat().st_size == 0
    with pytest.raises(StoreError, match="Check the permissions"):
        Store(tmp_path)


def test_the_outcomes_of_a_call_are_those_the_database_takes(tmp_path: Path) -> None:
    """A new outcome needs a migration: a database made before would refuse it and end the job."""
    from selfpruner.proposers.base import OUTCOMES

    [statement] = [sql for name, sql in objects(migrated_from_nothing(tmp_path / "store.db")).items() if name == "llm_call"]
    allowed = re.search(r"outcomeIN\((.*?)\)", statement)
    assert allowed is not None
    assert set(re.findall(r"\w+", allowed[1])) == set(OUTCOMES)
