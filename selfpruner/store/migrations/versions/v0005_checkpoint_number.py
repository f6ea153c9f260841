"""Where the checkpoint of a local search goes is a column, which a submitter cannot write.

Until here it was the name ``checkpoint`` in the job's metadata, which over HTTP is anybody's. It is believed only outside a
server's home, and only where it is a name that this program gives; older local searches had none, and wrote ``checkpoint``.
"""

from pathlib import Path

from alembic import op
from sqlalchemy import Connection

revision = "0005"
down_revision = "0004"

COLUMNS = (
    "number, id, owner, status, cancel_requested, created_at, started_at, finished_at, config, metadata, progress, result, error"
)
# SQLite adds no CHECK to a table that exists: it is made again and the rows are copied.
TABLE = """
    CREATE TABLE job_0005 (
        number INTEGER NOT NULL,
        id VARCHAR NOT NULL,
        owner VARCHAR NOT NULL,
        status VARCHAR NOT NULL,
        cancel_requested BOOLEAN NOT NULL,
        created_at INTEGER NOT NULL,
        started_at INTEGER,
        finished_at INTEGER,
        config JSON NOT NULL,
        metadata JSON NOT NULL,
        progress JSON,
        result JSON,
        error JSON,
        checkpoint_number INTEGER,
        PRIMARY KEY (number),
        CONSTRAINT job_status CHECK (status IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')),
        CONSTRAINT job_finished CHECK ((status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
        CONSTRAINT job_started CHECK (status IN ('queued', 'cancelled') OR started_at IS NOT NULL),
        CONSTRAINT job_error CHECK ((status = 'failed') = (error IS NOT NULL)),
        CONSTRAINT job_cancel_requested CHECK (cancel_requested IN (0, 1)),
        CONSTRAINT job_checkpoint_number CHECK (checkpoint_number BETWEEN 1 AND 1000000000),
        CONSTRAINT job_config_json CHECK (config IS NULL OR (json_valid(config) AND json_type(config) = 'object')),
        CONSTRAINT job_metadata_json CHECK (metadata IS NULL OR (json_valid(metadata) AND json_type(metadata) = 'object')),
        CONSTRAINT job_error_json CHECK (error IS NULL OR (json_valid(error) AND json_type(error) = 'object')),
        CONSTRAINT job_progress_json CHECK (progress IS NULL OR (json_valid(progress) AND json_type(progress) = 'object')),
        CONSTRAINT job_result_json CHECK (result IS NULL OR (json_valid(result) AND json_type(result) = 'object')),
        UNIQUE (id)
    )
"""
NAME = "json_extract(metadata, '$.checkpoint')"
NUMBER = f"""
    CASE WHEN {NAME} IS NULL OR {NAME} = 'checkpoint' THEN 1
        WHEN {NAME} GLOB 'checkpoint-[1-9]*' AND substr({NAME}, 12) NOT GLOB '*[^0-9]*' AND length({NAME}) <= 20
            THEN CAST(substr({NAME}, 12) AS INTEGER)
    END
"""


def upgrade() -> None:
    connection = op.get_bind()
    number = "NULL" if _of_a_server(connection) else NUMBER
    op.execute(TABLE)
    op.execute(f"INSERT INTO job_0005 ({COLUMNS}, checkpoint_number) SELECT {COLUMNS}, {number} FROM job")
    op.execute("UPDATE job_0005 SET metadata = json_remove(metadata, '$.checkpoint') WHERE checkpoint_number IS NOT NULL")
    op.execute("DROP TABLE job")
    op.execute("ALTER TABLE job_0005 RENAME TO job")
    op.execute("CREATE INDEX job_by_owner ON job (owner, number)")
    op.execute("CREATE INDEX job_by_status ON job (status, number)")


def _of_a_server(connection: Connection) -> bool:
    """Whether a server wrote this file: it makes the folder ``checkpoints`` before its database, and one in it for every job."""
    file = next(row[2] for row in connection.exec_driver_sql("PRAGMA database_list") if row[1] == "main")
    query = "SELECT 1 FROM checkpoint WHERE path LIKE '%_checkpoints_' || job_id LIMIT 1"
    return (Path(file).parent / "checkpoints").is_dir() or connection.exec_driver_sql(query).first() is not None
