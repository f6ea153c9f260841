"""Where the time of a job goes: a row per job and stage."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE stage (
            job_id VARCHAR NOT NULL,
            name VARCHAR NOT NULL,
            seconds FLOAT NOT NULL,
            tokens INTEGER NOT NULL,
            workers INTEGER NOT NULL,
            peak_mib FLOAT NOT NULL,
            PRIMARY KEY (job_id, name),
            CONSTRAINT stage_finite CHECK (seconds BETWEEN -1e300 AND 1e300 AND peak_mib BETWEEN -1e300 AND 1e300),
            CONSTRAINT stage_counts CHECK (seconds >= 0 AND tokens >= 0 AND workers >= 0 AND peak_mib >= 0),
            FOREIGN KEY(job_id) REFERENCES job (id)
        )
    """)
