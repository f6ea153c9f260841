"""Which schema a database file has, and how it gets the current one.

A new file is made from the tables at once. Alembic, which costs memory and start-up time, is imported only when an older file has
to be migrated. Views hold no data: they are dropped before a migration and made again from ``views.sql`` whenever their text
differs. Everything runs inside the caller's one transaction, so a migration that fails leaves the file as it was.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from sqlalchemy import Connection, Integer, String, Subquery, column, text

from selfpruner.errors import StoreError
from selfpruner.store.tables import REVISION, DatabaseTable


def revision(connection: Connection, path: Path) -> str | None:
    """The file's revision, None for an empty file. Raises StoreError for another program's database or a newer one of ours."""
    tables = set(connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars())
    if not tables:
        return None
    version = (
        connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() if "alembic_version" in tables else None
    )
    if "job" not in tables or not re.fullmatch(r"\d{4}", str(version)):
        raise StoreError(
            f"{path} is another program's SQLite database. Name another file, or move this one away.", code="store_foreign"
        )
    if str(version) > REVISION:
        raise StoreError(
            f"{path} was written by a newer selfpruner (schema {version}; this one knows up to {REVISION}). "
            "Upgrade selfpruner, or name another database.",
            code="store_newer",
        )
    return str(version)


def require_current(found: str | None, path: Path) -> None:
    """Readers do not migrate: raise StoreError unless the file has the current schema."""
    if found != REVISION:
        raise StoreError(
            f"{path} has schema {found or 'none'}, this selfpruner reads {REVISION}. "
            "Start the server on it once to bring it up to date.",
            code="store_older",
        )


def bring_up_to_date(connection: Connection, found: str | None) -> None:
    """Create, migrate or leave the tables of a database at revision ``found``, and make its views current."""
    if found is None:
        DatabaseTable.metadata.create_all(connection, checkfirst=False)
        connection.exec_driver_sql(
            "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, "
            "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
        )
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (REVISION,))
    elif found != REVISION:
        _drop_views(connection)
        _migrate(connection)
    _make_views(connection)


def views() -> dict[str, str]:
    """Name and CREATE statement of every view, in the order of ``views.sql``."""
    source = files("selfpruner.store").joinpath("views.sql").read_text(encoding="utf-8")
    return {match[2]: match[1] for match in re.finditer(r"^(CREATE VIEW (\w+) AS\n.*?);$", source, re.MULTILINE | re.DOTALL)}


@cache
def ranking() -> Subquery:
    """The view of that name for queries, ``(job_id, plan, place)``: its text, so that a file with older views, opened to be read
    only, gives the same order."""
    query = views()["ranking"].partition(" AS\n")[2]
    return text(query).columns(column("job_id", String), column("plan", String), column("place", Integer)).subquery("ranking")


def _present_views(connection: Connection) -> dict[str, str]:
    rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'view'")
    return {str(name): str(sql) for name, sql in rows}


def _drop_views(connection: Connection) -> None:
    for name in _present_views(connection):
        connection.exec_driver_sql(f'DROP VIEW "{name}"')


def _make_views(connection: Connection) -> None:
    wanted = views()
    if _present_views(connection) != wanted:
        _drop_views(connection)
        for statement in wanted.values():
            connection.exec_driver_sql(statement)


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    with as_file(files("selfpruner.store").joinpath("migrations")) as folder:
        config = Config()
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, REVISION)
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        raise StoreError(f"The migration to schema {REVISION} left rows without their job: {broken[:3]}. The file is unchanged.")
