BEGIN TRANSACTION;
CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num));
INSERT INTO "alembic_version" VALUES('0005');
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
);
INSERT INTO "candidate" VALUES('job_000000000000000000000001','aaaa',1,1800000005,0,'uniform','[]','[2,5]','[0.25,0.1953125]','evaluated',0.3,1.0,'w0',1024,NULL,1,0,NULL,NULL,NULL);
INSERT INTO "candidate" VALUES('job_000000000000000000000001','bbbb',2,1800000005,1,'mutate','["aaaa"]','[1,6]','[0.125,0.21875]','evaluated',0.27,0.9,'w1',3072,NULL,1,0,0.875,0.00025,0);
INSERT INTO "candidate" VALUES('job_000000000000000000000001','cccc',3,1800000005,1,'crossover','["aaaa","bbbb"]','[9,0]','[1.0,0.0]','infeasible',NULL,NULL,NULL,0,'no attention head left',0,0,NULL,NULL,NULL);
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
	CONSTRAINT checkpoint_verification_json CHECK (verification IS NULL OR (json_valid(verification) AND json_type(verification) = 'object')), 
	CONSTRAINT checkpoint_metrics_json CHECK (metrics IS NULL OR (json_valid(metrics) AND json_type(metrics) = 'object')), 
	FOREIGN KEY(job_id) REFERENCES job (id)
);
INSERT INTO "checkpoint" VALUES('ckpt_000000000000000000000004','job_000000000000000000000001','bbbb',1800000011,'/checkpoints/ckpt',1000,4000,'abababababababababababababababababababababababababababababababab','{"max_difference":0.0001}','{"kl":0.27}');
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
	CONSTRAINT evaluation_finite CHECK (kl BETWEEN -1e300 AND 1e300 AND nll BETWEEN -1e300 AND 1e300 AND seconds BETWEEN -1e300 AND 1e300), 
	CONSTRAINT evaluation_kind CHECK (kind IN ('measured', 'raced', 'foreseen')), 
	CONSTRAINT evaluation_outcome CHECK (outcome IN ('ok', 'out_of_memory', 'not_finite')), 
	CONSTRAINT evaluation_figures CHECK ((outcome = 'ok') = (kl IS NOT NULL OR nll IS NOT NULL)), 
	CONSTRAINT evaluation_reason CHECK (outcome = 'ok' OR reason IS NOT NULL), 
	CONSTRAINT evaluation_counts CHECK (tokens >= 0 AND seconds >= 0), 
	FOREIGN KEY(job_id) REFERENCES job (id)
);
INSERT INTO "evaluation" VALUES('job_000000000000000000000001','aaaa','w0',1800000006,1024,0.3,3.5,0.25,'measured','ok',NULL);
INSERT INTO "evaluation" VALUES('job_000000000000000000000001','bbbb','w1',1800000006,3072,0.27,3.4,0.5,'measured','ok',NULL);
INSERT INTO "evaluation" VALUES('job_000000000000000000000001','cccc','w1',1800000006,0,NULL,NULL,0.0,'measured','not_finite','no attention head left');
INSERT INTO "evaluation" VALUES('job_000000000000000000000001','bbbb','w2',1800000007,64,0.33,3.5,0.1,'raced','ok','rejected early after 64 tokens');
INSERT INTO "evaluation" VALUES('job_000000000000000000000001','dddd','s0',1800000007,0,0.32,NULL,0.1,'foreseen','ok','foreseen from slopes');
INSERT INTO "evaluation" VALUES('job_000000000000000000000001','eeee','w2',1800000007,0,NULL,NULL,0.0,'measured','out_of_memory','out of memory: no room');
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
);
INSERT INTO "event" VALUES('job_000000000000000000000001',1,1800000000,'info','job.queued','Job queued.','{}','status/1');
INSERT INTO "event" VALUES('job_000000000000000000000002',1,1800000001,'info','job.queued','Job queued.','{}','status/1');
INSERT INTO "event" VALUES('job_000000000000000000000003',1,1800000002,'info','job.queued','Job queued.','{}','status/1');
INSERT INTO "event" VALUES('job_000000000000000000000001',2,1800000003,'info','job.running','Job running.','{}','status/2');
INSERT INTO "event" VALUES('job_000000000000000000000002',2,1800000004,'info','job.running','Job running.','{}','status/2');
INSERT INTO "event" VALUES('job_000000000000000000000001',3,1800000009,'info','search.started','Searching','{"generations":7}','search');
INSERT INTO "event" VALUES('job_000000000000000000000001',4,1800000013,'info','job.succeeded','Job succeeded.','{}','status/4');
INSERT INTO "event" VALUES('job_000000000000000000000002',3,1800000014,'error','job.failed','A worker died 3 times.','{"message":"A worker died 3 times.","type":"server_error","param":null,"code":"worker_failed"}','status/3');
CREATE TABLE idempotency (
	owner VARCHAR NOT NULL, 
	"key" VARCHAR NOT NULL, 
	body_hash VARCHAR NOT NULL, 
	job_id VARCHAR NOT NULL, 
	created_at INTEGER NOT NULL, 
	PRIMARY KEY (owner, "key"), 
	CONSTRAINT idempotency_key CHECK (length(key) BETWEEN 1 AND 255), 
	FOREIGN KEY(job_id) REFERENCES job (id)
);
INSERT INTO "idempotency" VALUES('ada','key-1','4d8a0ad7d13fcb203808aa3b90d30b69738ffff1a68f45ecd22653127913ee65','job_000000000000000000000001',1800000000);
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
);
INSERT INTO "job" VALUES(1,'job_000000000000000000000001','ada','succeeded',0,1800000000,1800000003,1800000013,'{"model":"smollm2-135m","rate":0.2,"of":"decoder","preset":"default","pattern":"structured","criterion":"obs","compensation":"least_squares","granularity":"block","attention":"all","ffn_step":null,"drop_blocks":false,"calibration":{"sources":[{"source":"auto","weight":1.0}],"sequences":64,"length":512},"fitness_text":{"sources":[{"source":"auto","weight":1.0}],"sequences":96,"length":256},"report_text":{"sources":[{"source":"auto","weight":1.0}],"sequences":32,"length":512},"fitness":"kl","probe_tokens":1024,"population":6,"crossover_offspring":6,"mutation_offspring":6,"generations":7,"stages":[{"tokens":1024,"keep":6},{"tokens":3072,"keep":4}],"final_tokens":8192,"initial":["uniform","ramp","sensitivity","initialize"],"operators":["select","crossover","mutate","level_switch","recombine"],"proposer":"local","limits":{"calls":200,"tokens":2000000,"cost":5.0},"seed":0,"device":"auto","dtype":"auto"}','{"team":"naïve 🦙"}','{"stage":"done","generation":7,"generations":7,"evaluations":3,"plans":3,"best_fitness":0.27,"best_relative":0.9,"best_plan":"bbbb","message":"","data":{}}','{"best_plan":"bbbb"}',NULL,1);
INSERT INTO "job" VALUES(2,'job_000000000000000000000002','bob','failed',0,1800000001,1800000004,1800000014,'{"model":"smollm2-135m","rate":0.3,"of":"decoder","preset":"evolution","pattern":"structured","criterion":"obs","compensation":"least_squares","granularity":"block","attention":"all","ffn_step":null,"drop_blocks":false,"calibration":{"sources":[{"source":"auto","weight":1.0}],"sequences":64,"length":512},"fitness_text":{"sources":[{"source":"auto","weight":1.0}],"sequences":96,"length":256},"report_text":{"sources":[{"source":"auto","weight":1.0}],"sequences":32,"length":512},"fitness":"kl","probe_tokens":1024,"population":6,"crossover_offspring":6,"mutation_offspring":6,"generations":7,"stages":[{"tokens":1024,"keep":6},{"tokens":3072,"keep":4}],"final_tokens":8192,"initial":["uniform","ramp","sensitivity"],"operators":["level_switch","recombine"],"proposer":"local","limits":{"calls":200,"tokens":2000000,"cost":5.0},"seed":0,"device":"auto","dtype":"auto"}','{}',NULL,NULL,'{"message":"A worker died 3 times.","type":"server_error","param":null,"code":"worker_failed"}',1);
INSERT INTO "job" VALUES(3,'job_000000000000000000000003','bob','queued',0,1800000002,NULL,NULL,'{"model":"smollm2-135m","rate":0.4,"of":"decoder","preset":"default","pattern":"structured","criterion":"obs","compensation":"least_squares","granularity":"block","attention":"all","ffn_step":null,"drop_blocks":false,"calibration":{"sources":[{"source":"auto","weight":1.0}],"sequences":64,"length":512},"fitness_text":{"sources":[{"source":"auto","weight":1.0}],"sequences":96,"length":256},"report_text":{"sources":[{"source":"auto","weight":1.0}],"sequences":32,"length":512},"fitness":"kl","probe_tokens":1024,"population":6,"crossover_offspring":6,"mutation_offspring":6,"generations":7,"stages":[{"tokens":1024,"keep":6},{"tokens":3072,"keep":4}],"final_tokens":8192,"initial":["uniform","ramp","sensitivity","initialize"],"operators":["select","crossover","mutate","level_switch","recombine"],"proposer":"local","limits":{"calls":200,"tokens":2000000,"cost":5.0},"seed":0,"device":"auto","dtype":"auto"}','{}',NULL,NULL,NULL,2);
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
	CONSTRAINT llm_call_outcome CHECK (outcome IN ('ok', 'repaired', 'timeout', 'unreachable', 'rate_limited', 'server_error', 'rejected', 'refused', 'empty', 'truncated', 'too_large', 'not_json', 'invalid', 'no_new_plan')), 
	CONSTRAINT llm_call_finite CHECK (seconds BETWEEN -1e300 AND 1e300 AND cost BETWEEN -1e300 AND 1e300), 
	CONSTRAINT llm_call_counts CHECK (prompt_tokens >= 0 AND completion_tokens >= 0 AND seconds >= 0 AND cost >= 0), 
	CONSTRAINT llm_call_messages_json CHECK (messages IS NULL OR (json_valid(messages) AND json_type(messages) = 'array')), 
	FOREIGN KEY(job_id) REFERENCES job (id)
);
INSERT INTO "llm_call" VALUES('job_000000000000000000000001',1,1800000007,1,'mutate','local','smollm2-135m','[{"role":"system","content":"You prune."},{"role":"user","content":"Rates?"}]','{"rates":[0.125,0.21875]}','ok',210,32,1.5,0.0,'');
INSERT INTO "llm_call" VALUES('job_000000000000000000000001',2,1800000008,1,'crossover','openai','gpt','[{"role":"user","content":"Rates?"}]','','timeout',0,0,60.0,0.0,'no answer in 60 s');
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
);
INSERT INTO "stage" VALUES('job_000000000000000000000001','statistics',12.5,2048,1,800.0);
INSERT INTO "stage" VALUES('job_000000000000000000000001','scoring',4.5,4096,2,600.0);
INSERT INTO "stage" VALUES('job_000000000000000000000001','waiting',0.25,0,0,0.0);
CREATE INDEX job_by_status ON job (status, number);
CREATE INDEX job_by_owner ON job (owner, number);
CREATE VIEW newest AS
SELECT id AS job_id FROM job ORDER BY number DESC LIMIT 1;
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
COMMIT;
