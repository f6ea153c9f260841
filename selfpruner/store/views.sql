-- Views made for people with only the sqlite3 shell. Made again whenever this file changes, so they need no migration.
-- In every view: rates are removed / original parameters, lower fitness is better, relative is fitness over that of the uniform
-- plan on the same tokens (1 = as good as uniform). A database may hold several jobs: every row carries its job_id.

-- The newest job, for `WHERE job_id IN newest`.
CREATE VIEW newest AS
SELECT id AS job_id FROM job ORDER BY number DESC LIMIT 1;

-- The one order of a job's plans, best first; lists, ranks and "best" everywhere are this. First what the job itself holds to be its
-- best: what its result names, else what the final decided, else the leader of a search that runs. Then plans scored to the end
-- before those that a race rejected early, and those of the job's own rate before a front's other ones. Then what can be trusted
-- most: the final's plans, which were all scored on the same unseen tokens, then the population, then what it left out; among equals
-- by relative. Plans without fitness come last. place counts from 1.
CREATE VIEW ranking AS
SELECT
    candidate.job_id,
    candidate.plan_hash AS plan,
    row_number() OVER (
        PARTITION BY candidate.job_id
        ORDER BY
            candidate.plan_hash IS NOT coalesce(
                json_extract(job.result, '$.best_plan'),
                (SELECT json_extract(event.data, '$.best') FROM event WHERE event.job_id = job.id AND event.key = 'final'),
                json_extract(job.progress, '$.best_plan')
            ),
            CASE candidate.status WHEN 'evaluated' THEN candidate.rejected WHEN 'pending' THEN 2 ELSE 3 END,
            candidate.relative IS NULL,
            candidate.window IS NOT 'final',
            NOT candidate.survived,
            candidate.relative,
            candidate.fitness,
            candidate.sequence
    ) AS place
FROM candidate
JOIN job ON job.id = candidate.job_id;

-- One row per candidate. rank 1 is the best plan of its job (see ranking); plans without fitness have none. window: the tokens that
-- fitness and relative are of, final or those of a generation. predicted: the relative fitness expected before it was scored.
-- rejected: a race ended early for it, and its fitness is an estimate.
CREATE VIEW population AS
SELECT
    candidate.job_id,
    candidate.generation,
    CASE WHEN candidate.status = 'evaluated' THEN ranking.place END AS rank,
    candidate.plan_hash AS plan,
    operator,
    parents,
    (SELECT json_group_array(round(value, 4)) FROM json_each(candidate.rates)) AS rates,
    fitness,
    relative,
    window,
    predicted,
    status,
    survived,
    rejected,
    reason,
    sequence
FROM candidate
JOIN ranking ON ranking.job_id = candidate.job_id AND ranking.plan = candidate.plan_hash
ORDER BY candidate.job_id, ranking.place;

-- One row per job that has an evaluated plan: the one of rank 1.
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
JOIN ranking ON ranking.job_id = job.id AND ranking.place = 1
JOIN candidate ON candidate.job_id = job.id AND candidate.plan_hash = ranking.plan AND candidate.status = 'evaluated'
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

-- What each operator contributed. survived: plans in the last population; rejected: evaluated plans that a race ended early for;
-- best_relative: of the others; improved: plans better than every evaluated plan made before them (a job's first plan improves on
-- nothing); seconds: what scoring its plans took in the search; credit: the gain per second that the bandit believed in, mean
-- over plans.
CREATE VIEW operator_report AS
WITH scored AS (
    SELECT *, CASE WHEN status = 'evaluated' AND NOT rejected THEN
        CASE WHEN max(relative) OVER (PARTITION BY job_id) IS NULL THEN fitness ELSE relative END
    END AS score
    FROM candidate
), compared AS (
    SELECT *, score < min(score) OVER (
        PARTITION BY job_id ORDER BY sequence ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ) AS better
    FROM scored
), spent AS (
    SELECT job_id, plan_hash, sum(seconds) AS seconds FROM evaluation WHERE window NOT LIKE 'report%' GROUP BY job_id, plan_hash
)
SELECT
    compared.job_id,
    operator,
    count(*) AS plans,
    count(*) FILTER (WHERE status = 'evaluated') AS evaluated,
    count(*) FILTER (WHERE rejected) AS rejected,
    count(*) FILTER (WHERE status = 'infeasible') AS infeasible,
    count(*) FILTER (WHERE status = 'failed') AS failed,
    count(*) FILTER (WHERE survived) AS survived,
    count(*) FILTER (WHERE better) AS improved,
    min(relative) FILTER (WHERE score IS NOT NULL) AS best_relative,
    total(spent.seconds) AS seconds,
    avg(credit) AS credit
FROM compared
LEFT JOIN spent ON spent.job_id = compared.job_id AND spent.plan_hash = compared.plan_hash
GROUP BY compared.job_id, operator;

-- How well the landscape's model foresaw a generation: mean relative fitness of the children it had a prediction for, expected and
-- measured, and the rank correlation of the two on the tokens that all of them were scored on.
CREATE VIEW foresight AS
SELECT
    candidate.job_id,
    candidate.generation,
    count(*) AS children,
    avg(candidate.predicted) AS predicted,
    avg(candidate.relative) AS measured,
    json_extract(event.data, '$.rank_correlation') AS rank_correlation
FROM candidate
LEFT JOIN event ON event.job_id = candidate.job_id AND event.key = 'generation-' || candidate.generation
WHERE candidate.predicted IS NOT NULL AND candidate.relative IS NOT NULL AND NOT candidate.rejected
GROUP BY candidate.job_id, candidate.generation;

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

-- Where the time of a job went, all of its runs together. share: of the whole. waiting: for a worker to start or to be free. tokens
-- that were read, written or scored, of every plan its own. peak_mib: the largest resident size of a worker meanwhile, in MiB.
CREATE VIEW stages AS
SELECT
    job_id,
    name AS stage,
    seconds,
    seconds / max(sum(seconds) OVER (PARTITION BY job_id), 1e-9) AS share,
    tokens,
    workers,
    peak_mib
FROM stage
ORDER BY job_id, stage.rowid;
