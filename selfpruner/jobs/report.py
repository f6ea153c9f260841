"""The figures of a job: the dense model, the uniform plan, the best one, and the usual baseline, on the held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import TypeAdapter

from selfpruner.catalogue import PATTERNS
from selfpruner.evolution.evaluator import Fitness
from selfpruner.evolution.extras import finite
from selfpruner.evolution.outcome import Outcome
from selfpruner.evolution.windows import report_windows
from selfpruner.files.report import Contribution, Figures, Inputs, Report, StageShare, Subject
from selfpruner.jobs.running_job import PREPARED, RunningJob
from selfpruner.planning.space import Plan
from selfpruner.workers.tasks import BaselineRequest, MeasureRequest, MeasureResult

INPUTS = TypeAdapter(Inputs)


async def figures(job: RunningJob) -> Report:
    """The dense model and the plans worth comparing, and what was pruned how."""
    plans: dict[Subject, Plan] = {"dense": job.space.dense, "uniform": Plan(job.outcome.uniform.levels), "best": job.best}
    if job.outcome.ramp is not None:
        plans["ramp"] = Plan(job.outcome.ramp.levels)
    with job.stages.at("report"):
        scores = await _scores(job, plans)
    with job.stages.at("timing"):
        timed = await _speeds(job, plans)
    report: Report = {}
    for name, plan in plans.items():
        row: Figures = {"parameters": job.parameters(plan)}
        if name in timed.rows:
            row |= timed.rows[name].figures
        if plan.hash in scores:
            score = scores[plan.hash]
            row |= {"kl": finite(score.kl), "perplexity": finite(score.perplexity), "tokens": score.tokens}
        report[name] = row
    written = job.outcome.repetition
    if "dense" in written:
        report["dense"]["repetition"] = round(written["dense"], 4)
    if job.outcome.best.plan_hash in written:
        report["best"]["repetition"] = round(written[job.outcome.best.plan_hash], 4)
    config, best = job.config, job.outcome.best
    return {
        **report,
        **INPUTS.validate_json(job.prepared.model_dump_json(include=PREPARED)),
        "target": {"rate": config.rate, "of": config.of, "parameters_to_remove": job.space.target},
        "method": {
            "pattern": config.pattern,
            "criterion": config.criterion,
            "compensation": config.compensation,
            "preset": config.preset,
        },
        "best_plan": best.plan_hash,
        "plan": {
            "hash": best.plan_hash,
            "operator": best.operator,
            "levels": list(best.levels),
            "layer_rates": [round(rate, 4) for rate in job.space.layer_rates(job.best)],
            "removed": job.space.removed(job.best),
        },
    }


async def _scores(job: RunningJob, plans: Mapping[Subject, Plan]) -> dict[str, Fitness]:
    job.teller("reporting")("scoring on the held-out text")
    windows = report_windows(job.prepared.texts["report"].sequences)
    counted = job.evaluator.evaluations
    scores: dict[str, Fitness] = await job.extras.attempt(
        "scores",
        "The plans were not scored on the held-out text",
        lambda: job.evaluator.score(list(plans.values()), windows),
        {},
    )
    job.evaluator.evaluations = counted  # the report's figures are no part of the search's cost
    if reason := next((score.reason for score in scores.values() if score.outcome != "ok"), None):
        job.extras.note("scores", "Not all plans were scored on the held-out text", f"{reason}.")
    return scores


async def _speeds(job: RunningJob, plans: Mapping[Subject, Plan]) -> MeasureResult:
    tell = job.teller("reporting")
    tell("timing")
    asked = MeasureRequest(plans={name: plan.levels for name, plan in plans.items()})
    nothing = MeasureResult(rows={})
    timed = await job.extras.attempt("timing", "The models were not timed", lambda: job.pool.run(job.session, asked, tell), nothing)
    if timed.not_timed:
        job.extras.note("timing", "The models were not timed", f"{timed.not_timed}.")
    return timed


async def baseline(job: RunningJob) -> Report:
    """The uniform baseline by its name; nothing where the job's own uniform plan is it, or it could not be scored. The last task of
    a job, because the worker gives up the session for it."""
    name, changes = PATTERNS[job.config.pattern].baseline
    if {"criterion": job.config.criterion, "compensation": job.config.compensation} == changes:
        return {}
    every = tuple(range(job.prepared.texts["report"].sequences))
    asked = BaselineRequest(changes=dict(changes), text="report", sequences=every)
    job.teller("reporting")("scoring the uniform baseline")
    with job.stages.at("baseline"):
        row = await job.extras.attempt(
            "baseline", "The uniform baseline was not scored", lambda: job.pool.run(job.session, asked), None
        )
        if row is None:
            return {}
        job.stages.count(row.tokens)
    report: Report = {}
    report[name] = {
        "kl": row.kl,
        "perplexity": None if row.nll is None else math.exp(min(row.nll, 700.0)),
        "tokens": row.tokens,
        "parameters": row.parameters,
    }
    return report


def stages(job: RunningJob) -> list[StageShare]:
    """Where the time went, also that of runs before an interruption."""
    rows = job.stages.rows()
    whole = math.fsum(row.seconds for row in rows) or 1.0
    return [
        {
            "stage": row.name,
            "seconds": round(row.seconds, 3),
            "share": round(row.seconds / whole, 4),
            "tokens": row.tokens,
            "workers": row.workers,
            "peak_mib": round(row.peak_mib),
        }
        for row in rows
    ]


def operators(outcome: Outcome) -> dict[str, Contribution]:
    """What each operator contributed."""
    return {name: {"made": made, "improved": outcome.improved.get(name, 0)} for name, made in sorted(outcome.made.items())}
