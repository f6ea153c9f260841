-- Views made for people with only the sqlite3 shell. Made again whenever this file changes, so they need no migration.
-- In every view: rates are removed / original parameters, lower fitness is better, relative is fitness over that of the uniform
-- plan on the same tokens (1 = as good as uniform).

-- One row per candidate. rank 1 is the best evaluated plan of its job; plans without fitness have none.
CREATE VIEW population AS
SELECT
    job_id,
    generation,
    CASE WHEN status = 'evaluated' THEN
        row_number() OVER (PARTITION BY job_id ORDER BY status <> 'evaluated', relative IS NULL, relative, fitness, sequence)
    END AS rank,
    plan_hash AS plan,
    operator,
    parents,
    (SELECT json_group_array(round(value, 4)) FROM json_each(candidate.rates)) AS rates,
    fitness,
    relative,
    status,
    survived,
    reason,
    sequence
FROM candidate;

-- One row per job that has an evaluated plan: the plan its result names, else the plan of rank 1.
-- CROSS JOIN: SQLite then goes through the jobs first, not through every candidate.
CREATE VIEW best AS
SELECT
    job.id AS job_id,
    json_extract(job.config, '$.model') AS model,
    json_extract(job.config, '$.rate') AS rate,
    job.status AS job_status,
    candidate.plan_hash AS plan,
    candidate.generation,
    candidate.operator,
    candidate.parents,
    (SELECT json_group_array(round(value, 4)) FROM json_each(candidate.rates)) AS rates,
    candidate.fitness,
    candidate.relative,
    checkpoint.id AS checkpoint,
    checkpoint.path AS path
FROM job
CROSS JOIN candidate ON candidate.job_id = job.id AND candidate.plan_hash = coalesce(
    (SELECT plan_hash FROM candidate WHERE job_id = job.id AND plan_hash = json_extract(job.result, '$.best_plan')),
    (SELECT plan_hash FROM candidate WHERE job_id = job.id AND status = 'evaluated'
     ORDER BY relative IS NULL, relative, fitness, sequence LIMIT 1)
)
LEFT JOIN checkpoint ON checkpoint.job_id = job.id AND checkpoint.plan_hash = candidate.plan_hash;

-- The best plan of each job (depth 0), its parents (depth 1), their parents and so on, each plan once at its nearest depth.
CREATE VIEW lineage AS
WITH RECURSIVE ancestor (job_id, plan, depth) AS (
    SELECT job_id, plan, 0 FROM best
    UNION
    SELECT ancestor.job_id, parent.value, ancestor.depth + 1
    FROM ancestor
    JOIN candidate ON candidate.job_id = ancestor.job_id AND candidate.plan_hash = ancestor.plan
    JOIN json_each(candidate.parents) AS parent
    WHERE ancestor.depth < 1000
)
SELECT
    ancestor.job_id,
    min(ancestor.depth) AS depth,
    ancestor.plan,
    candidate.operator,
    candidate.generation,
    candidate.parents,
    candidate.fitness,
    candidate.relative
FROM ancestor
JOIN candidate ON candidate.job_id = ancestor.job_id AND candidate.plan_hash = ancestor.plan
GROUP BY ancestor.job_id, ancestor.plan
ORDER BY ancestor.job_id, depth, candidate.sequence;

-- What each operator contributed. improved: plans better than every evaluated plan made before them (a job's first plan improves
-- on nothing).
CREATE VIEW operator_report AS
WITH scored AS (
    SELECT *, CASE WHEN status = 'evaluated' THEN
        CASE WHEN max(relative) OVER (PARTITION BY job_id) IS NULL THEN fitness ELSE relative END
    END AS score
    FROM candidate
), compared AS (
    SELECT *, score < min(score) OVER (
        PARTITION BY job_id ORDER BY sequence ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ) AS better
    FROM scored
)
SELECT
    job_id,
    operator,
    count(*) AS plans,
    count(*) FILTER (WHERE status = 'evaluated') AS evaluated,
    count(*) FILTER (WHERE status = 'infeasible') AS infeasible,
    count(*) FILTER (WHERE status = 'failed') AS failed,
    min(relative) FILTER (WHERE status = 'evaluated') AS best_relative,
    count(*) FILTER (WHERE better) AS improved
FROM compared
GROUP BY job_id, operator;

-- What the proposer's calls cost. ok: calls that gave plans; seconds and cost are sums, cost in the currency of the prices.
CREATE VIEW llm_cost AS
SELECT
    job_id,
    proposer,
    model,
    operator,
    count(*) AS calls,
    count(*) FILTER (WHERE outcome IN ('ok', 'repaired')) AS ok,
    count(*) FILTER (WHERE outcome NOT IN ('ok', 'repaired')) AS failed,
    sum(prompt_tokens) AS prompt_tokens,
    sum(completion_tokens) AS completion_tokens,
    sum(seconds) AS seconds,
    sum(cost) AS cost
FROM llm_call
GROUP BY job_id, proposer, model, operator;
