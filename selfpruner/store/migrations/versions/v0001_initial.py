"""The first schema: jobs, candidates, evaluations, LLM calls, events, checkpoints, idempotency keys."""

from alembic import op

revision = "0001"
down_revision = None

STATEMENTS = (
    """
    CREATE TABLE job (
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
        PRIMARY KEY (number),
        CONSTRAINT job_status CHECK (status IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')),
        CONSTRAINT job_finished CHECK ((status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
        CONSTRAINT job_started CHECK (status IN ('queued', 'cancelled') OR started_at IS NOT NULL),
        CONSTRAINT job_error CHECK ((status = 'failed') = (error IS NOT NULL)),
        CONSTRAINT job_cancel_requested CHECK (cancel_requested IN (0, 1)),
        CONSTRAINT job_config_json CHECK (config IS NULL OR (json_valid(config) AND json_type(config) = 'object')),
        CONSTRAINT job_metadata_json CHECK (metadata IS NULL OR (json_valid(metadata) AND json_type(metadata) = 'object')),
        CONSTRAINT job_error_json CHECK (error IS NULL OR (json_valid(error) AND json_type(error) = 'object')),
        CONSTRAINT job_progress_json CHECK (progress IS NULL OR (json_valid(progress) AND json_type(progress) = 'object')),
        CONSTRAINT job_result_json CHECK (result IS NULL OR (json_valid(result) AND json_type(result) = 'object')),
        UNIQUE (id)
    )
    """,
    "CREATE INDEX job_by_owner ON job (owner, number)",
    "CREATE INDEX job_by_status ON job (status, number)",
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
        PRIMARY KEY (job_id, plan_hash),
        CONSTRAINT candidate_sequence UNIQUE (job_id, sequence),
        CONSTRAINT candidate_status CHECK (status IN ('pending', 'evaluated', 'infeasible', 'failed')),
        CONSTRAINT candidate_fitness CHECK (fitness BETWEEN -1e300 AND 1e300 AND relative BETWEEN -1e300 AND 1e300),
        CONSTRAINT candidate_evaluated CHECK (status <> 'evaluated' OR fitness IS NOT NULL),
        CONSTRAINT candidate_reason CHECK (status NOT IN ('infeasible', 'failed') OR reason IS NOT NULL),
        CONSTRAINT candidate_counts CHECK (generation >= 0 AND tokens >= 0 AND sequence >= 1 AND survived IN (0, 1)),
        CONSTRAINT candidate_levels_json CHECK (levels IS NULL OR (json_valid(levels) AND json_type(levels) = 'array')),
        CONSTRAINT candidate_rates_json CHECK (rates IS NULL OR (json_valid(rates) AND json_type(rates) = 'array')),
        CONSTRAINT candidate_parents_json CHECK (parents IS NULL OR (json_valid(parents) AND json_type(parents) = 'array')),
        FOREIGN KEY(job_id) REFERENCES job (id)
    )
    """,
    """
    CREATE TABLE checkpoint (
        id VARCHAR NOT NULL,
        job_id VARCHAR NOT NULL,
        plan_hash VARCHAR NOT NULL,
        created_at INTEGER NOT NULL,
        path VARCHAR NOT NULL,
        parameters INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        manifest_sha256 VARCHAR NOT NULL,
        verification JSON NOT NULL,
        metrics JSON NOT NULL,
        PRIMARY KEY (id),
        CONSTRAINT checkpoint_plan UNIQUE (job_id, plan_hash),
        CONSTRAINT checkpoint_sizes CHECK (parameters > 0 AND bytes > 0),
        CONSTRAINT checkpoint_manifest CHECK (length(manifest_sha256) = 64),
        CONSTRAINT checkpoint_verification_json CHECK (verification IS NULL OR (json_valid(verification) AND
            json_type(verification) = 'object')),
        CONSTRAINT checkpoint_metrics_json CHECK (metrics IS NULL OR (json_valid(metrics) AND json_type(metrics) = 'object')),
        FOREIGN KEY(job_id) REFERENCES job (id)
    )
    """,
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
        reason VARCHAR,
        PRIMARY KEY (job_id, plan_hash, window),
        CONSTRAINT evaluation_finite CHECK (kl BETWEEN -1e300 AND 1e300 AND nll BETWEEN -1e300 AND 1e300 AND seconds
            BETWEEN -1e300 AND 1e300),
        CONSTRAINT evaluation_reason CHECK (kl IS NOT NULL OR nll IS NOT NULL OR reason IS NOT NULL),
        CONSTRAINT evaluation_counts CHECK (tokens >= 0 AND seconds >= 0),
        FOREIGN KEY(job_id) REFERENCES job (id)
    )
    """,
    """
    CREATE TABLE event (
        job_id VARCHAR NOT NULL,
        sequence INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        level VARCHAR NOT NULL,
        type VARCHAR NOT NULL,
        message VARCHAR NOT NULL,
        data JSON NOT NULL,
        "key" VARCHAR NOT NULL,
        PRIMARY KEY (job_id, sequence),
        CONSTRAINT event_key UNIQUE (job_id, "key"),
        CONSTRAINT event_level CHECK (level IN ('info', 'warn', 'error')),
        CONSTRAINT event_sequence CHECK (sequence >= 1),
        CONSTRAINT event_data_json CHECK (data IS NULL OR (json_valid(data) AND json_type(data) = 'object')),
        FOREIGN KEY(job_id) REFERENCES job (id)
    )
    """,
    """
    CREATE TABLE idempotency (
        owner VARCHAR NOT NULL,
        "key" VARCHAR NOT NULL,
        body_hash VARCHAR NOT NULL,
        job_id VARCHAR NOT NULL,
        created_at INTEGER NOT NULL,
        PRIMARY KEY (owner, "key"),
        CONSTRAINT idempotency_key CHECK (length(key) BETWEEN 1 AND 255),
        FOREIGN KEY(job_id) REFERENCES job (id)
    )
    """,
    """
    CREATE TABLE llm_call (
        job_id VARCHAR NOT NULL,
        sequence INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        operator VARCHAR NOT NULL,
        proposer VARCHAR NOT NULL,
        model VARCHAR NOT NULL,
        messages JSON NOT NULL,
        reply VARCHAR NOT NULL,
        outcome VARCHAR NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        seconds FLOAT NOT NULL,
        cost FLOAT NOT NULL,
        detail VARCHAR NOT NULL,
        PRIMARY KEY (job_id, sequence),
        CONSTRAINT llm_call_outcome CHECK (outcome IN ('ok', 'repaired', 'timeout', 'unreachable', 'rate_limited',
            'server_error', 'rejected', 'refused', 'empty', 'truncated', 'too_large', 'not_json', 'invalid',
            'no_new_plan')),
        CONSTRAINT llm_call_finite CHECK (seconds BETWEEN -1e300 AND 1e300 AND cost BETWEEN -1e300 AND 1e300),
        CONSTRAINT llm_call_counts CHECK (prompt_tokens >= 0 AND completion_tokens >= 0 AND seconds >= 0 AND cost >= 0),
        CONSTRAINT llm_call_messages_json CHECK (messages IS NULL OR (json_valid(messages) AND json_type(messages) = 'array')),
        FOREIGN KEY(job_id) REFERENCES job (id)
    )
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
