"""What was believed of a candidate when it was made: predicted relative fitness, its operator's credit, whose scores it knew."""

from alembic import op

revision = "0002"
down_revision = "0001"

COLUMNS = (
    "job_id, plan_hash, sequence, created_at, generation, operator, parents, levels, rates, status, fitness, relative, window, "
    "tokens, reason, survived"
)
# SQLite adds no CHECK to a table that exists: it is made again and the rows are copied.
STATEMENTS = (
    "ALTER TABLE candidate RENAME TO candidate_0001",
    """
    CREATE TABLE candidate (
        job_id VARCHAR NOT NULL,
        plan_hash VARCHAR NOT NULL,
        sequence INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        operator VARCHAR NOT NULL,
        parents JSON NOT NULL,
        levels JSON NOT NULL,
        rates JSON NOT NULL,
        status VARCHAR NOT NULL,
        fitness FLOAT,
        relative FLOAT,
        window VARCHAR,
        tokens INTEGER NOT NULL,
        reason VARCHAR,
        survived BOOLEAN NOT NULL,
        predicted FLOAT,
        credit FLOAT,
        informed_by INTEGER,
        PRIMARY KEY (job_id, plan_hash),
        CONSTRAINT candidate_sequence UNIQUE (job_id, sequence),
        CONSTRAINT candidate_status CHECK (status IN ('pending', 'evaluated', 'infeasible', 'failed')),
        CONSTRAINT candidate_fitness CHECK (fitness BETWEEN -1e300 AND 1e300 AND relative BETWEEN -1e300 AND 1e300),
        CONSTRAINT candidate_evaluated CHECK (status <> 'evaluated' OR fitness IS NOT NULL),
        CONSTRAINT candidate_reason CHECK (status NOT IN ('infeasible', 'failed') OR reason IS NOT NULL),
        CONSTRAINT candidate_counts CHECK (generation >= 0 AND tokens >= 0 AND sequence >= 1 AND survived IN (0, 1)),
        CONSTRAINT candidate_beliefs CHECK (predicted BETWEEN -1e300 AND 1e300 AND credit BETWEEN -1e300 AND 1e300),
        CONSTRAINT candidate_informed_by CHECK (informed_by BETWEEN 0 AND generation),
        CONSTRAINT candidate_levels_json CHECK (levels IS NULL OR (json_valid(levels) AND json_type(levels) = 'array')),
        CONSTRAINT candidate_rates_json CHECK (rates IS NULL OR (json_valid(rates) AND json_type(rates) = 'array')),
        CONSTRAINT candidate_parents_json CHECK (parents IS NULL OR (json_valid(parents) AND json_type(parents) = 'array')),
        FOREIGN KEY(job_id) REFERENCES job (id)
    )
    """,
    f"INSERT INTO candidate ({COLUMNS}) SELECT {COLUMNS} FROM candidate_0001",
    "DROP TABLE candidate_0001",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
