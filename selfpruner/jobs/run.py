"""A whole job: prepare, search, report, export. What the server's runner and the command line's ``search`` both call.

Knows no torch. Everything slow happens in the pool; everything decided goes through the recorder, so a job that was interrupted
is run again from the start and repeats nothing that was recorded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfpruner import names
from selfpruner.config import SearchConfig
from selfpruner.errors import ConflictError
from selfpruner.evolution.evaluator import Evaluator, Fitness
from selfpruner.evolution.extras import Extras, finite
from selfpruner.evolution.front import Front, Latencies, Member
from selfpruner.evolution.loop import Search
from selfpruner.evolution.outcome import Outcome
from selfpruner.evolution.windows import Windows, report_windows
from selfpruner.jobs.front_report import front_rows, latencies_of
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.progress import FORESEEN
from selfpruner.proposers import ProposerSettings, create
from selfpruner.proposers.llm_calls import LlmChannel
from selfpruner.records import Progress, Recorder
from selfpruner.workers.base import Json, Session, WorkerPool

# What is usual without retraining, as a reference in every report: uniform rates by FLAP's score and bias where units go, by
# magnitude where weights do. Under which name it is reported, and what it changes of the config.
BASELINES = {
    "structured": ("uniform_flap_bias", {"criterion": "flap", "compensation": "bias"}),
    "n_m": ("uniform_magnitude", {"criterion": "magnitude", "compensation": "none"}),
    "unstructured": ("uniform_magnitude", {"criterion": "magnitude", "compensation": "none"}),
}


@dataclass(frozen=True, slots=True)
class JobResult:
    """``report``: the figures (see :func:`run_job`). ``checkpoint``: path, parameters, bytes, manifest_sha256, verification,
    plan_hash, metrics. ``reused``: all of it was there already."""

    report: dict[str, Any]
    checkpoint: dict[str, Any]
    reused: bool = False


def session_of(config: SearchConfig, cache: Path, plan: Plan | None = None) -> Session:
    """The session of a config: jobs that differ only in how they search share a worker's prepared state. With a ``plan``: one for
    this plan alone."""
    body = config.model_dump(mode="json")
    if plan is None:
        return Session(config.prepared_key, body, str(cache))
    return Session(f"{config.prepared_key}-{plan.hash}", body, str(cache), list(plan.levels))


async def run_job(
    config: SearchConfig,
    *,
    job_id: str,
    pool: WorkerPool,
    proposer_settings: Mapping[str, ProposerSettings],
    recorder: Recorder,
    cache: Path,
    checkpoint_dir: Path,
) -> JobResult:
    """Run ``config`` to the end and leave a verified checkpoint in ``checkpoint_dir``.

    The report holds ``dense``, ``uniform``, ``ramp``, ``best`` and ``uniform_flap_bias``, or ``uniform_magnitude`` where single
    weights go (parameters, of which zeros are none, kl, perplexity, prefill_tps, decode_tps where timed; repetition of ``dense``
    and ``best`` where they were made to write), ``evaluations``, ``plans``, ``tokens`` (plan-tokens that the search was charged),
    ``stopped`` (why its generations ended), ``tokens_saved`` (at most, by ending early), ``rank_correlation`` (predicted against
    measured), ``seconds``, ``peak_worker_mib``, ``operators``, ``texts``, ``model``, ``plan`` and ``checkpoint``; with more than
    one objective also ``front`` and, where it is one of them, ``latency``. What could not be had is left out, and ``missing`` says
    why, by what failed: ``scores``, ``timing``, ``baseline``, ``front``, ``latency``, ``generation_probe``. Raises UnknownNameError
    for a proposer the settings do not name and ConfigError for a fitness text too short for the stages, both before any work.
    """
    started = time.monotonic()
    if config.uses_llm:
        names.check_proposer(config.proposer, proposer_settings)
    session = session_of(config, cache)
    windows = Windows.of(config)

    def tell(text: str) -> None:
        if text.startswith(FORESEEN):
            recorder.event("foreseen", "search.foreseen", text)
        recorder.progress(Progress(stage="preparing", generations=config.generations, message=text))

    tell("waiting for a worker")
    prepared = await pool.run(session, "prepare", {"output": str(checkpoint_dir)}, tell)
    _refuse_other_inputs(recorder.find_event("prepared"), prepared)
    space = SearchSpace.from_dict(prepared["space"])
    recorder.event(
        "prepared",
        "search.prepared",
        f"{prepared['model']['name']}: {prepared['model']['parameters']:,} parameters, {space.target:,} to remove; calibrated on "
        f"{_sources(prepared, 'calibration')}, judged on {_sources(prepared, 'fitness')}.",
        data={"model": prepared["model"], "texts": prepared["texts"], "dtype": prepared["dtype"], "device": prepared["device"]},
    )
    extras = Extras(recorder)
    evaluator = Evaluator(pool, session, recorder)
    evaluator.peak_mib = float(prepared.get("peak_mib", 0.0))
    channel = None
    if config.uses_llm:
        settings = proposer_settings[config.proposer]
        proposer = create(config.proposer, settings, pool=pool, session=session)
        channel = LlmChannel(proposer, recorder, config.limits, settings, config.seed)
    front = Front(config, space, evaluator, recorder, windows)
    latencies = None
    if "latency" in config.objective:
        length = int(prepared["texts"]["report"]["length"])
        latencies = await latencies_of(pool, session, length, tell)  # nothing has been searched yet: what fails here is refused
    search = Search(config, space, evaluator, recorder, windows, channel, prepared.get("signals", {}))
    outcome = await search.run()
    if outcome.not_written is not None:
        extras.missing["generation_probe"] = outcome.not_written
    members: list[Member] = []
    if len(config.objective) > 1:
        found = outcome

        async def make_front() -> tuple[Outcome, list[Member]]:
            return await front.make(search.state, found, latencies, _teller("searching", config, found, evaluator, recorder))

        outcome, members = await extras.attempt("front", "The front was not made", make_front, (outcome, members))
    report = await _report(config, prepared, space, outcome, evaluator, pool, session, recorder, extras)
    if members:

        async def front_report() -> dict[str, Any]:
            return await _front(config, prepared, space, outcome, members, latencies, evaluator, pool, session, recorder, extras)

        nothing: dict[str, Any] = {}
        report |= await extras.attempt("front", "The report has no front", front_report, nothing)
    checkpoint = await _export(config, job_id, prepared, space, outcome, report, evaluator, pool, session, recorder, checkpoint_dir)
    name, changes = BASELINES[config.pattern]
    if {"criterion": config.criterion, "compensation": config.compensation} != changes:
        _teller("reporting", config, outcome, evaluator, recorder)("scoring the uniform baseline")
        baseline = await extras.attempt(
            "baseline",
            "The uniform baseline was not scored",
            lambda: _baseline(changes, prepared, evaluator, pool, session),
            None,
        )
        if baseline is not None:
            report[name] = baseline
    report |= {
        "evaluations": evaluator.evaluations,
        "plans": len(search.state.candidates),
        "tokens": outcome.tokens,
        "stopped": outcome.stopped,
        "tokens_saved": outcome.tokens_saved,
        "rank_correlation": None if outcome.rank_correlation is None else round(outcome.rank_correlation, 3),
        "seconds": round(time.monotonic() - started, 1),
        "peak_worker_mib": round(max(evaluator.peak_mib, float(checkpoint.pop("peak_mib", 0.0)))),
        "operators": _operators(outcome),
        "checkpoint": checkpoint["path"],
        "verification": checkpoint["verification"],
    }
    if extras.missing:
        report["missing"] = dict(extras.missing)
    _teller("done", config, outcome, evaluator, recorder)(f"checkpoint {checkpoint['path']}")
    return JobResult(report, checkpoint)


def _refuse_other_inputs(before: Mapping[str, Any] | None, prepared: Json) -> None:
    """Raise ConflictError where a job goes on with a model or texts that are not those it began with: scores of one model would
    stand beside those of another, and decide."""
    if before is None:
        return
    inputs = {"model": (before["model"], prepared["model"])}
    inputs |= {f"{role} text": (text, prepared["texts"].get(role, {})) for role, text in before["texts"].items()}
    changed = [name for name, (then, now) in inputs.items() if then.get("fingerprint") not in (None, now.get("fingerprint"))]
    if changed:
        raise ConflictError(
            f"This job began with other files: its {' and its '.join(changed)} changed since. All its plans are judged with the "
            "same; put the files back, or start a new search."
        )


async def _report(
    config: SearchConfig,
    prepared: Json,
    space: SearchSpace,
    outcome: Outcome,
    evaluator: Evaluator,
    pool: WorkerPool,
    session: Session,
    recorder: Recorder,
    extras: Extras,
) -> dict[str, Any]:
    """The figures on the held-out report text, for the dense model and the plans worth comparing."""

    tell = _teller("reporting", config, outcome, evaluator, recorder)
    tell("scoring on the held-out text")
    plans = {"dense": space.dense, "uniform": Plan(outcome.uniform.levels), "best": Plan(outcome.best.levels)}
    if outcome.ramp is not None:
        plans["ramp"] = Plan(outcome.ramp.levels)
    windows = report_windows(prepared["texts"]["report"]["sequences"])
    counted = evaluator.evaluations
    scores: dict[str, Fitness] = await extras.attempt(
        "scores", "The plans were not scored on the held-out text", lambda: evaluator.score(list(plans.values()), windows), {}
    )
    evaluator.evaluations = counted  # the report's figures are no part of the search's cost
    if reason := next((score.reason for score in scores.values() if score.reason is not None), None):
        extras.note("scores", "Not all plans were scored on the held-out text", f"{reason}.")
    tell("timing")
    asked = {"plans": {name: list(plan.levels) for name, plan in plans.items()}}
    nothing: Json = {}
    timed = await extras.attempt("timing", "The models were not timed", lambda: pool.run(session, "measure", asked, tell), nothing)
    if reason := timed.get("not_timed"):
        extras.note("timing", "The models were not timed", f"{reason}.")
    dense = int(prepared["model"]["parameters"])
    report: dict[str, Any] = {}
    for name, plan in plans.items():
        report[name] = {"parameters": dense - space.removed(plan), **timed.get("rows", {}).get(name, {})}
        if plan.hash in scores:
            score = scores[plan.hash]
            report[name] |= {"kl": finite(score.kl), "perplexity": finite(score.perplexity), "tokens": score.tokens}
    for name, key in (("dense", "dense"), ("best", outcome.best.plan_hash)):
        if key in outcome.repetition:
            report[name]["repetition"] = round(outcome.repetition[key], 4)
    report |= {
        "texts": prepared["texts"],
        "model": prepared["model"],
        "dtype": prepared["dtype"],
        "device": prepared["device"],
        "target": {"rate": config.rate, "of": config.of, "parameters_to_remove": space.target},
        "method": {
            "pattern": config.pattern,
            "criterion": config.criterion,
            "compensation": config.compensation,
            "preset": config.preset,
        },
        "best_plan": outcome.best.plan_hash,
        "plan": {
            "hash": outcome.best.plan_hash,
            "operator": outcome.best.operator,
            "levels": list(outcome.best.levels),
            "layer_rates": [round(rate, 4) for rate in space.layer_rates(Plan(outcome.best.levels))],
            "removed": space.removed(Plan(outcome.best.levels)),
        },
    }
    return report


async def _front(
    config: SearchConfig,
    prepared: Json,
    space: SearchSpace,
    outcome: Outcome,
    members: Sequence[Member],
    latencies: Latencies | None,
    evaluator: Evaluator,
    pool: WorkerPool,
    session: Session,
    recorder: Recorder,
    extras: Extras,
) -> dict[str, Any]:
    """``front`` (see :func:`front_rows`), and ``latency`` where that is an objective: what its predictions are made of."""
    rows = await front_rows(
        members,
        best=outcome.best.plan_hash,
        metric=config.fitness,
        prepared=prepared,
        space=space,
        evaluator=evaluator,
        windows=report_windows(prepared["texts"]["report"]["sequences"]),
        pool=pool,
        session=session,
        tell=_teller("reporting", config, outcome, evaluator, recorder),
        extras=extras,
    )
    found: dict[str, Any] = {"front": rows}
    if latencies is not None:
        dense, rest = round(latencies.of(space.dense), 1), round(latencies.rest, 1)
        found["latency"] = {"prompt_tokens": latencies.tokens, "dense_us": dense, "unpruned_us": rest}
    return found


async def _baseline(
    changes: Mapping[str, str], prepared: Json, evaluator: Evaluator, pool: WorkerPool, session: Session
) -> dict[str, Any]:
    """The uniform baseline on the report text. The last task of a job, because the worker gives up the session for it."""
    every = list(range(prepared["texts"]["report"]["sequences"]))
    row = await pool.run(session, "baseline", {"changes": dict(changes), "text": "report", "sequences": every})
    evaluator.peak_mib = max(evaluator.peak_mib, float(row.get("peak_mib", 0.0)))
    return {
        "kl": row["kl"],
        "perplexity": None if row["nll"] is None else math.exp(min(row["nll"], 700.0)),
        "tokens": row["tokens"],
        "parameters": row["parameters"],
    }


async def _export(
    config: SearchConfig,
    job_id: str,
    prepared: Json,
    space: SearchSpace,
    outcome: Outcome,
    report: Mapping[str, Any],
    evaluator: Evaluator,
    pool: WorkerPool,
    session: Session,
    recorder: Recorder,
    directory: Path,
) -> dict[str, Any]:
    tell = _teller("exporting", config, outcome, evaluator, recorder)
    tell("writing and verifying the checkpoint")
    metrics = {
        name: {
            key: report[name][key]
            for key in ("parameters", "kl", "perplexity", "prefill_tps", "decode_tps")
            if report[name].get(key) is not None
        }
        for name in ("dense", "uniform", "best")
    }
    plan = Plan(outcome.best.levels)
    card = {
        "base_model": prepared["model"]["name"],
        "rate": config.rate,
        "of": config.of,
        "pattern": config.pattern,
        "criterion": config.criterion,
        "compensation": config.compensation,
        "calibration": _source_names(prepared, "calibration"),
        "plan_hash": plan.hash,
        "levels": list(plan.levels),
        "layer_rates": space.layer_rates(plan),
        "metrics": metrics,
        "job_id": job_id,
    }
    result = await pool.run(session, "export", {"plan": list(plan.levels), "directory": str(directory), "card": card}, tell)
    recorder.event(
        "exported",
        "checkpoint.exported",
        f"Checkpoint written, loaded again in a fresh process and compared: {result['parameters']:,} parameters.",
        data={"plan": plan.hash, "verification": result["verification"]},
    )
    return {**result, "plan_hash": plan.hash, "metrics": metrics}


def _teller(stage: str, config: SearchConfig, outcome: Outcome, evaluator: Evaluator, recorder: Recorder) -> Callable[[str], None]:
    """Progress after the search: what was found stays in view."""

    def tell(text: str) -> None:
        recorder.progress(
            Progress(
                stage=stage,
                generation=outcome.generations,
                generations=config.generations,
                evaluations=evaluator.evaluations,
                plans=len(evaluator.plans),
                best_fitness=outcome.best.fitness,
                best_relative=outcome.best.relative,
                best_plan=outcome.best.plan_hash,
                message=text,
                data={"operators": dict(outcome.made), "improved": dict(outcome.improved), "tokens": outcome.tokens},
            )
        )

    return tell


def _operators(outcome: Outcome) -> dict[str, dict[str, int]]:
    return {name: {"made": made, "improved": outcome.improved.get(name, 0)} for name, made in sorted(outcome.made.items())}


def _source_names(prepared: Json, role: str) -> list[str]:
    return [str(source["source"]) for source in prepared["texts"][role]["sources"]]


def _sources(prepared: Json, role: str) -> str:
    return " + ".join(_source_names(prepared, role))
