"""What a report says about a front: every member's figures on the held-out text, and its speed where latency is an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from selfpruner.evolution.extras import finite
from selfpruner.evolution.front import Latencies, Member
from selfpruner.evolution.windows import report_windows
from selfpruner.files.report import FrontRow, Report
from selfpruner.jobs.running_job import RunningJob
from selfpruner.records import Window
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import MeasureRequest, MeasureResult, TimeBlocksRequest

# Members timed at once, beside the dense model: each of them is held in memory.
TOGETHER = 3


async def front_report(job: RunningJob, members: Sequence[Member], latencies: Latencies | None) -> Report:
    """``front`` (see :func:`front_rows`), and ``latency`` where that is an objective: what its predictions are made of."""
    found: Report = {"front": await front_rows(job, members, report_windows(job.prepared.texts["report"].sequences))}
    if latencies is not None:
        dense, rest = round(latencies.of(job.space.dense), 1), round(latencies.rest, 1)
        found["latency"] = {"prompt_tokens": latencies.tokens, "dense_us": dense, "unpruned_us": rest}
    return found


async def front_rows(job: RunningJob, members: Sequence[Member], windows: Sequence[Window]) -> list[FrontRow]:
    """One row per member, best quality first, scored on ``windows``. Measured speeds are missing where the models do not fit the
    memory."""
    tell = job.teller("reporting")
    tell("front: scoring on the held-out text")
    counted = job.evaluator.evaluations
    scores = await job.evaluator.score([member.plan for member in members], windows)
    job.evaluator.evaluations = counted  # the report's figures are no part of the search's cost
    rows: list[FrontRow] = []
    for member in members:
        candidate, score = member.candidate, scores[member.candidate.plan_hash]
        row: FrontRow = {
            "plan": candidate.plan_hash,
            "operator": candidate.operator,
            "rate": member.rate,
            "parameters": job.parameters(member.plan),
            "fitness": member.values(job.config.fitness)[0],
            "kl": finite(score.kl),
            "perplexity": finite(score.perplexity),
            "levels": list(candidate.levels),
            "layer_rates": [round(rate, 4) for rate in job.space.layer_rates(member.plan)],
            "best": candidate.plan_hash == job.outcome.best.plan_hash,
        }
        if member.latency is not None:
            row["latency_us"] = round(member.latency, 1)
        rows.append(row)
    timed = [member for member in members if member.latency is not None]
    for start in range(0, len(timed), TOGETHER):
        tell(f"front: timing plans {start + 1} to {min(start + TOGETHER, len(timed))} of {len(timed)}")
        part = {member.candidate.plan_hash: member.candidate.levels for member in timed[start : start + TOGETHER]}
        asked = MeasureRequest(plans={"dense": job.space.dense.levels, **part}, decode=False)
        time = partial(job.pool.run, job.session, asked, tell)
        found = await job.extras.attempt("timing", "A front was not timed", time, MeasureResult(rows={}))
        speeds = {name: row.prefill_tps for name, row in found.rows.items() if row.prefill_tps is not None}
        for row in rows:
            if row["plan"] in speeds:
                row["prefill_tps"] = speeds[row["plan"]]
                row["speedup"] = round(speeds[row["plan"]] / speeds["dense"], 3)
    return rows


async def latencies_of(pool: WorkerPool, session: Session, tokens: int, tell: Callable[[str], None]) -> Latencies:
    """What every block takes at every level on the pool's device."""
    found = await pool.run(session, TimeBlocksRequest(tokens=tokens), tell)
    return Latencies(found.tokens, found.blocks, found.rest)
