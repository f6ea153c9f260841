"""A whole job: prepare, search, report, export. The server's runner and the command line's ``search`` both call it.

Knows no torch. Everything slow happens in the pool; every decision goes through the recorder. An interrupted job therefore runs
again from the start and repeats nothing that was recorded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from selfpruner import catalogue
from selfpruner.config import Role, SearchConfig
from selfpruner.errors import ConflictError, SelfprunerError
from selfpruner.evaluation import split
from selfpruner.evolution.evaluator import Evaluator
from selfpruner.evolution.extras import Extras
from selfpruner.evolution.front import Front, Latencies, Member
from selfpruner.evolution.loop import Search
from selfpruner.evolution.outcome import Outcome
from selfpruner.evolution.windows import Windows
from selfpruner.files.report import Report
from selfpruner.jobs import card, report
from selfpruner.jobs.front_report import front_report, latencies_of
from selfpruner.jobs.lifecycle import JobResult, MadeCheckpoint
from selfpruner.jobs.running_job import PREPARED, RunningJob
from selfpruner.planning.space import Plan
from selfpruner.progress import Foreseen
from selfpruner.proposers import ProposerSettings, create
from selfpruner.proposers.llm_calls import LlmChannel
from selfpruner.records import Progress, Recorder
from selfpruner.stages import Stages
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.staged_pool import StagedPool
from selfpruner.workers.tasks import ExportRequest, PrepareRequest, PrepareResult


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

    Raises UnknownNameError for a proposer the settings do not name and ConfigError for a fitness text too short for the stages,
    both before any work.
    """
    if "llm" in config.needs:
        catalogue.check_proposer(config.proposer, proposer_settings)
    windows = Windows.of(config)
    stages = Stages(recorder.find_stages())
    try:
        return await _run(
            config, windows, stages, job_id, StagedPool(pool, stages), proposer_settings, recorder, cache, checkpoint_dir
        )
    finally:
        with suppress(SelfprunerError):  # what the job came to matters more
            recorder.save_stages(stages.rows())


async def _run(
    config: SearchConfig,
    windows: Windows,
    stages: Stages,
    job_id: str,
    pool: WorkerPool,
    proposer_settings: Mapping[str, ProposerSettings],
    recorder: Recorder,
    cache: Path,
    checkpoint_dir: Path,
) -> JobResult:
    started = time.monotonic()
    session = session_of(config, cache)

    def tell(text: str) -> None:
        if isinstance(text, Foreseen):
            recorder.event("foreseen", "search.foreseen", text)
        recorder.progress(Progress(stage="preparing", generations=config.generations, message=text))

    tell("waiting for a worker")
    with stages.at("loading"):
        prepared = await split.prepare(pool, session, PrepareRequest(output=str(checkpoint_dir)), tell)
    _refuse_other_inputs(recorder.find_event("prepared"), prepared)
    space, facts = prepared.space, prepared.model_dump(mode="json", include=PREPARED)
    recorder.event(
        "prepared",
        "search.prepared",
        f"{prepared.model.name}: {prepared.model.parameters:,} parameters, {space.target:,} to remove; calibrated on "
        f"{_sources(prepared, 'calibration')}, judged on {_sources(prepared, 'fitness')}.",
        data=facts,
    )
    recorder.save_stages(stages.rows())
    extras = Extras(recorder)
    evaluator = Evaluator(pool, session, recorder, stages)
    channel = None
    if "llm" in config.needs:
        settings = proposer_settings[config.proposer]
        proposer = create(config.proposer, settings, pool=pool, session=session)
        channel = LlmChannel(proposer, recorder, config.limits, settings, config.seed, stages)
    front = Front(config, space, evaluator, recorder, windows)
    latencies = None
    if "latency" in config.objective:
        length = prepared.texts["report"].length
        with stages.at("timing"):
            latencies = await latencies_of(pool, session, length, tell)  # nothing was searched yet: what fails here is refused
    search = Search(config, space, evaluator, recorder, windows, channel, prepared.signals)
    outcome = await search.run()
    recorder.save_stages(stages.rows())
    if outcome.not_written is not None:
        extras.missing["generation_probe"] = outcome.not_written
    job = RunningJob(
        id=job_id,
        config=config,
        pool=pool,
        session=session,
        recorder=recorder,
        prepared=prepared,
        space=space,
        evaluator=evaluator,
        extras=extras,
        outcome=outcome,
    )
    members = await _front(job, front, search, latencies)
    found = await report.figures(job)
    if members:
        nothing: Report = {}
        with stages.at("front"):
            found |= await extras.attempt(
                "front", "The report has no front", lambda: front_report(job, members, latencies), nothing
            )
    with stages.at("export"):
        checkpoint = await _export(job, found, checkpoint_dir)
    recorder.save_stages(stages.rows())
    found |= await report.baseline(job)
    outcome = job.outcome
    found |= {
        "evaluations": evaluator.evaluations,
        "plans": len(search.state.candidates),
        "tokens": outcome.tokens,
        "stopped": outcome.stopped,
        "tokens_saved": outcome.tokens_saved,
        "rank_correlation": None if outcome.rank_correlation is None else round(outcome.rank_correlation, 3),
        "seconds": round(time.monotonic() - started, 1),
        "stages": report.stages(job),
        "peak_worker_mib": round(max(row.peak_mib for row in stages.rows())),
        "operators": report.operators(outcome),
        "checkpoint": checkpoint["path"],
        "verification": checkpoint["verification"],
    }
    if extras.missing:
        found["missing"] = dict(extras.missing)
    job.teller("done")(f"checkpoint {checkpoint['path']}")
    return JobResult(found, checkpoint)


async def _front(job: RunningJob, front: Front, search: Search, latencies: Latencies | None) -> list[Member]:
    """The front's members where it is asked for and can be made; making it may give the job a better plan."""
    if len(job.config.objective) == 1:
        return []

    async def make() -> tuple[Outcome, list[Member]]:
        return await front.make(search.state, job.outcome, latencies, job.teller("searching"))

    without: tuple[Outcome, list[Member]] = (job.outcome, [])
    with job.stages.at("front"):
        job.outcome, members = await job.extras.attempt("front", "The front was not made", make, without)
    return members


async def _export(job: RunningJob, figures: Report, directory: Path) -> MadeCheckpoint:
    """The verified checkpoint of the best plan."""
    tell = job.teller("exporting")
    tell("writing and verifying the checkpoint")
    metrics = card.metrics(figures)
    told = card.card(job.config, job.prepared, job.space, job.best, job_id=job.id, metrics=metrics)
    result = await job.pool.run(job.session, ExportRequest(plan=job.best.levels, directory=str(directory), card=told), tell)
    job.recorder.event(
        "exported",
        "checkpoint.exported",
        f"Checkpoint written, loaded again in a fresh process and compared: {result.parameters:,} parameters.",
        data={"plan": job.best.hash, "verification": result.verification},
    )
    return {
        "path": result.path,
        "parameters": result.parameters,
        "bytes": result.bytes,
        "manifest_sha256": result.manifest_sha256,
        "verification": result.verification,
        "write_seconds": result.write_seconds,
        "verify_seconds": result.verify_seconds,
        "reused": result.reused,
        "plan_hash": job.best.hash,
        "metrics": metrics,
    }


class _Fingerprinted(TypedDict):
    fingerprint: NotRequired[str | None]


class _Begun(TypedDict):
    """What a job remembers of its files; that of earlier versions has no fingerprints."""

    model: _Fingerprinted
    texts: dict[str, _Fingerprinted]


def _refuse_other_inputs(before: Mapping[str, object] | None, prepared: PrepareResult) -> None:
    """Raise ConflictError where a job goes on with a model or texts that are not those it began with: scores of one model would
    stand beside those of another, and decide."""
    if before is None:
        return
    begun = TypeAdapter(_Begun).validate_python(before)
    then = {"model": begun["model"], **{f"{role} text": text for role, text in begun["texts"].items()}}
    now = {"model": prepared.model.fingerprint, **{f"{role} text": text.fingerprint for role, text in prepared.texts.items()}}
    changed = [name for name, facts in then.items() if facts.get("fingerprint") not in (None, now.get(name))]
    if changed:
        raise ConflictError(
            f"This job began with other files: its {' and its '.join(changed)} changed since. All its plans are judged with the "
            "same; put the files back, or start a new search."
        )


def _sources(prepared: PrepareResult, role: Role) -> str:
    return " + ".join(source["source"] for source in prepared.texts[role].sources)
