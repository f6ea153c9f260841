"""The schema's history: migrations give the same tables as the models, old files open, foreign and newer ones are refused."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

import selfpruner.store
from selfpruner.config import SearchConfig
from selfpruner.errors import ConflictError, StoreError
from selfpruner.evolution.outcome import Outcome
from selfpruner.jobs import runs
from selfpruner.jobs.local_jobs import LocalJobs
from selfpruner.records import Evaluation
from selfpruner.stages import Stage
from selfpruner.store import schema
from selfpruner.store.recorder import JobRecorder
from selfpruner.store.store import Store
from selfpruner.store.tables import REVISION, DatabaseTable
from selfpruner.testing.spaces import space_of
from tests.helpers import GOLDEN, searching

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
        assert compare_metadata(context, DatabaseTable.metadata) == []
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
        "stages",
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
        infeasible = Evaluation("cccc", "w1", 0, None, None, 0.0, "no attention head left", "measured", "not_finite")
        assert recorder.find_evaluation("cccc", "w1") == infeasible
        assert [call.outcome for call in store.llm_calls(done.id)] == ["ok", "timeout"]
        assert [event.sequence for event in store.events(done.id).data] == [1, 2, 3, 4]
        assert [checkpoint.metrics for checkpoint in store.checkpoints(done.id)] == [{"kl": 0.27}]
        spent = [Stage("statistics", 12.5, 2048, 1, 800.0), Stage("scoring", 4.5, 4096, 2, 600.0), Stage("waiting", 0.25)]
        assert recorder.find_stages() == (spent if dump.stem >= "store_0004" else [])
        store.transition(waiting.id, "running")
    assert objects(path) == objects(migrated_from_nothing(tmp_path / "fresh.db"))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT plan, relative FROM best").fetchall() == [("bbbb", 0.9)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


# What releases before 0003 wrote, whose state was in the beginning of a reason, and what it is now: kind and outcome.
EVALUATIONS = {
    (0.31, 3.5, None): ("measured", "ok"),
    (0.35, None, None): ("measured", "ok"),  # the plan that a survey went around
    (0.33, 3.5, "rejected early after 64 tokens"): ("raced", "ok"),
    (None, None, "rejected early after 64 tokens"): ("raced", "not_finite"),
    (0.32, None, "foreseen from slopes"): ("foreseen", "ok"),
    (None, None, "out of memory: A task needs more than the device has."): ("measured", "out_of_memory"),
    (None, None, "fitness is not finite (kl nan, nll nan)"): ("measured", "not_finite"),
}


@pytest.mark.parametrize("dump", [dump for dump in DATABASES if dump.stem < "store_0003"], ids=lambda dump: dump.stem)
def test_state_is_read_from_the_reasons_of_older_rows(dump: Path, tmp_path: Path) -> None:
    path = restored(dump, tmp_path / "old.db")
    with closing(sqlite3.connect(path)) as connection, connection:
        (job,) = connection.execute("SELECT id FROM job WHERE status = 'succeeded'").fetchone()
        write = "INSERT INTO evaluation (job_id, plan_hash, window, created_at, tokens, kl, nll, seconds, reason) VALUES "
        for number, figures in enumerate(EVALUATIONS):
            connection.execute(f"{write} (?, ?, 'w2', 1800000007, 64, ?, ?, 0.1, ?)", (job, f"p{number}", *figures))
        columns = (
            "(job_id, plan_hash, sequence, created_at, generation, operator, parents, levels, rates, status, fitness, relative"
        )
        row = "1800000007, 1, 'mutate', '[]', '[1,2]', '[0.1,0.2]'"
        for plan, status, fitness, reason in (
            ("early", "evaluated", 0.33, "rejected early after 64 tokens"),
            ("large", "failed", None, "out of memory: A task needs more than the device has."),
        ):
            connection.execute(
                f"INSERT INTO candidate {columns}, tokens, reason, survived) "
                f"VALUES (?, ?, (SELECT max(sequence) + 1 FROM candidate), {row}, ?, ?, ?, 64, ?, 0)",
                (job, plan, status, fitness, fitness, reason),
            )
    with Store(path) as store:
        recorder = store.recorder(job)
        for number, ((kl, nll, reason), state) in enumerate(EVALUATIONS.items()):
            assert recorder.find_evaluation(f"p{number}", "w2") == Evaluation(f"p{number}", "w2", 64, kl, nll, 0.1, reason, *state)
        assert {row.plan_hash: row.rejected for row in store.candidates(job).data} == {
            **dict.fromkeys(("aaaa", "bbbb", "cccc", "large"), False),
            "early": True,
        }


def as_it_was(path: Path, old: Path, revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in a database of an earlier ``revision``, without the columns that it had not."""
    engine = create_engine(f"sqlite:///{old}")
    with monkeypatch.context() as patch, engine.begin() as connection:
        patch.setattr(schema, "REVISION", revision)
        schema._migrate(connection)
    engine.dispose()
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.execute("ATTACH ? AS new", (str(path),))
        for table in ("job", "candidate", "evaluation", "llm_call", "event"):
            columns = ", ".join(f'"{name}"' for _, name, *_ in connection.execute(f"PRAGMA main.table_info({table})"))
            connection.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}")


@pytest.mark.parametrize("revision", ["0001", "0002", "0003", "0004"])
def test_a_job_of_an_older_release_goes_on(revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its history is replayed from the migrated rows: nothing is scored again, and the search decides as before."""
    config, space = searching.config_of("default"), space_of(layers=3)
    tried = searching.MemoryRecorder()
    asyncio.run(searching.Run(config, space, tried).go())
    too_large, broken = [plan for plan, row in tried.candidates.items() if row.generation == 1 and not row.survived][:2]

    def search(path: Path, job: str | None = None) -> tuple[str, Outcome, searching.AnalyticPool, list[dict[str, Any]]]:
        pool = searching.AnalyticPool(space)
        pool.too_large, pool.broken = {too_large}, {broken}
        with Store(path) as store:
            job = job or store.create_job(config)[0].id
            outcome = asyncio.run(searching.Run(config, space, store.recorder(job), pool=pool).go())  # type: ignore[arg-type]
            return job, outcome, pool, [row.model_dump() for row in store.candidates(job, limit=500).data]

    job, outcome, pool, rows = search(tmp_path / "new.db")
    assert pool.seen
    assert {row["status"] for row in rows} == {"evaluated", "failed", "infeasible"}
    assert any(row["rejected"] for row in rows)
    as_it_was(tmp_path / "new.db", tmp_path / "old.db", revision, monkeypatch)
    _, again, asked, replayed = search(tmp_path / "old.db", job)
    assert not asked.seen
    lost = {} if revision > "0001" else {"predicted": None, "credit": None, "informed_by": None}
    assert replayed == [row | lost for row in rows]
    assert (again.best.plan_hash, again.made, again.improved, again.tokens, again.stopped) == (
        outcome.best.plan_hash,
        outcome.made,
        outcome.improved,
        outcome.tokens,
        outcome.stopped,
    )


@pytest.mark.parametrize("dump", DATABASES, ids=lambda dump: dump.stem)
def test_a_folder_of_an_older_release_is_read(dump: Path, tmp_path: Path) -> None:
    path = restored(dump, tmp_path / runs.DATABASE)
    with LocalJobs(tmp_path) as jobs:
        done = jobs.list()["data"][-1]
        assert runs.checkpoint_folder(tmp_path, jobs._store.job(done["id"])) == tmp_path / "checkpoint"
        assert [(row["id"], row["rejected"]) for row in jobs.candidates(done["id"])] == [
            ("aaaa", False),
            ("bbbb", False),
            ("cccc", False),
        ]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(REVISION,)]


@pytest.mark.parametrize(("home", "known"), [("searches", True), ("server", False), ("lost", False)])
def test_only_a_local_search_is_believed_where_its_checkpoint_is(home: str, known: bool, tmp_path: Path) -> None:
    """Until 0004 that was in the metadata, which over HTTP is the submitter's; a server's home is known by its folder, or by where
    a checkpoint was."""
    path = restored(GOLDEN / "store_0004.sql", tmp_path / runs.DATABASE)
    jobs = [f"job_00000000000000000000000{number}" for number in (1, 2, 3)]
    with closing(sqlite3.connect(path)) as connection, connection:
        for job, name in zip(jobs, ("checkpoint-12", "/tmp/victim", "checkpoint-2/../.."), strict=True):
            connection.execute("UPDATE job SET metadata = json_object('a', 'b', 'checkpoint', ?) WHERE id = ?", (name, job))
        if home == "lost":
            connection.execute("UPDATE checkpoint SET path = '/home/ann/.selfpruner/checkpoints/' || job_id")
    if home == "server":
        (tmp_path / "checkpoints").mkdir()
    with Store(path) as store:
        done, *others = (store.job(job) for job in jobs)
        assert done.checkpoint_number == (12 if known else None)
        assert ("checkpoint" in done.user_metadata) != known
        for job in others:
            assert job.checkpoint_number is None
            assert job.user_metadata.keys() == {"a", "checkpoint"}, "the submitter's"
            with pytest.raises(ConflictError, match="is a server's"):
                runs.checkpoint_folder(tmp_path, job)


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

revision = "0006"
down_revision = "0005"


def upgrade():
    with op.batch_alter_table("job", recreate="always") as batch:
        batch.add_column(sa.Column("note", sa.String(), nullable=False, server_default="none"))
    {then}
"""


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretend that a release with revision 0006, which rebuilds the table every other table refers to, is running."""

    def install(then: str) -> None:
        folder = tmp_path / "release"
        shutil.copytree(STORE_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "migrations/versions/v0006_note.py").write_text(NEXT_REVISION.format(then=then))
        monkeypatch.setattr(schema, "files", lambda _: folder)
        monkeypatch.setattr(schema, "REVISION", "0006")

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
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0006",)]
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
