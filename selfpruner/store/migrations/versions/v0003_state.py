"""State is columns: how an evaluation was made and what came of it, and whether a race ended early for a candidate.

Until here all three were read from the text of a reason, which is what older rows are filled from.
"""

from alembic import op

revision = "0003"
down_revision = "0002"

CANDIDATE = (
    "job_id, plan_hash, sequence, created_at, generation, operator, parents, levels, rates, status, fitness, relative, window, "
    "tokens, reason, survived, predicted, credit, informed_by"
)
EVALUATION = "job_id, plan_hash, window, created_at, tokens, kl, nll, seconds, reason"
# SQLite adds no CHECK to a table that exists: it is made again and the rows are copied.
STATEMENTS = (
    "ALTER TABLE candidate RENAME TO candidate_0002",
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
        rejected BOOLEAN NOT NULL,
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
        CONSTRAINT candidate_rejected CHECK (rejected IN (0, 1) AND (rejected = 0 OR status = 'evaluated')),
        CONSTRAINT candidate_beliefs CHECK (predicted BETWEEN -1e300 AND 1e300 AND credit BETWEEN -1e300 AND 1e300),
        CONSTRAINT candidate_informed_by CHECK (informed_by BETWEEN 0 AND generation),
        CONSTRAINT candidate_levels_json CHECK (levels IS NULL OR (json_valid(levels) AND json_type(levels) = 'array')),
        CONSTRAINT candidate_rates_json CHECK (rates IS NULL OR (json_valid(rates) AND json_type(rates) = 'array')),
        CONSTRAINT candidate_parents_json CHECK (parents IS NULL OR (json_valid(parents) AND json_type(parents) = 'array')),
        FOREIGN KEY(job_id) REFERENCES job (id)
    )
    """,
    f"INSERT INTO candidate ({CANDIDATE}, rejected) "
    f"SELECT {CANDIDATE}, status = 'evaluated' AND reason IS NOT NULL FROM candidate_0002",
    "DROP TABLE candidate_0002",
    "ALTER TABLE evaluation RENAME TO evaluation_0002",
    """
    CREATE TABLE evaluation (
        job_id VARCHAR NOT NULL,
        plan_hash VARCHAR NOT NULL,
        window VARCHAR NOT NULL,
        created_at INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        kl FLOAT,
        nll FLOAT,
        seconds FLOAT NOT NULL,
        kind VARCHAR NOT NULL,
        outcome VARCHAR NOT NULL,
        reason VARCHAR,
        PRIMARY KEY (job_id, plan_hash, window),
        CONSTRAINT evaluation_finite CHECK (kl BETWEEN -1e300 AND 1e300 AND nll BETWEEN -1e300 AND 1e300 AND seconds
            BETWEEN -1e300 AND 1e300),
        CONSTRAINT evaluation_kind CHECK (kind IN ('measured', 'raced', 'foreseen')),
        CONSTRAINT evaluation_outcome CHECK (outcome IN ('ok', 'out_of_memory', 'not_finite')),
        CONSTRAINT evaluation_figures CHECK ((outcome = 'ok') = (kl IS NOT NULL OR nll IS NOT NULL)),
        CONSTRAINT evaluation_reason CHECK (outcome = 'ok' OR reason IS NOT NULL),
        CONSTRAINT evaluation_counts CHECK (tokens >= 0 AND seconds >= 0),
        FOREIGN KEY(job_id) REFERENCES job (id)
    )
    """,
    f"""
    INSERT INTO evaluation ({EVALUATION}, kind, outcome) SELECT {EVALUATION},
        CASE WHEN reason LIKE 'rejected early%' THEN 'raced' WHEN reason LIKE 'foreseen%' THEN 'foreseen' ELSE 'measured' END,
        CASE WHEN kl IS NOT NULL OR nll IS NOT NULL THEN 'ok'
            WHEN reason LIKE 'out of memory%' THEN 'out_of_memory' ELSE 'not_finite' END
    FROM evaluation_0002
    """,
    "DROP TABLE evaluation_0002",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
