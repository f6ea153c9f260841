"""The Python API: ``search``, ``prune``, ``evaluate``, ``quality``, ``benchmark``, ``export`` and ``load``, run in this process.

``devices`` are those of several worker processes instead, which do the work of one call together: ``"cuda:0,cuda:1"``, or
``"cpu*2"`` for two that share the cores. Each holds the model. ``ray``, of ``search`` and ``prune``, is the HOST:PORT of a
Ray cluster: then they are those of each of its nodes.

Calls block and take plain arguments; results are dataclasses. Errors are those of :mod:`selfpruner.errors`. ``progress`` shows on
stderr what is being done and how long it will take. Give it a function to receive these texts instead, or False for silence.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from selfpruner import catalogue
from selfpruner.calibration import files
from selfpruner.config import Bytes, SearchConfig, Source, TextConfig, field_names
from selfpruner.errors import ConfigError, NotFoundError, from_problems
from selfpruner.evaluation import split
from selfpruner.files import manifest, places
from selfpruner.files.cache_folder import default_cache as default_cache
from selfpruner.files.manifest import NAME as MANIFEST
from selfpruner.jobs import runs
from selfpruner.jobs.card import card
from selfpruner.jobs.lifecycle import JobLife, JobResult, MadeCheckpoint
from selfpruner.jobs.run import run_job, session_of
from selfpruner.models import saved
from selfpruner.models.memory import ENVIRONMENT
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.progress import OnProgress, shown
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.store.objects import checkpoint_facts
from selfpruner.store.store import Store
from selfpruner.timing.report import BenchmarkReport, Settings
from selfpruner.workers import devices as workers
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.child import load_handler
from selfpruner.workers.tasks import ExpectRequest, ExportRequest, PrepareRequest, PrepareResult

if TYPE_CHECKING:
    from selfpruner.export.folder import Exported
    from selfpruner.jobs.live_view import Watch
    from selfpruner.judging.quality import Quality

T = TypeVar("T")
_SEARCH, _JUDGE = "selfpruner.jobs.handler:SessionHandler", "selfpruner.judging.handler:JudgeHandler"


class Conversion(TypedDict):
    """How a checkpoint is converted, see :func:`export`."""

    quantize: str | None
    tensor_parallel: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """A checkpoint made without a search, or an export of one."""

    path: Path
    parameters: int
    plan: Plan
    layer_rates: Sequence[float]
    verification: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ModelScore:
    """Figures of one model on one text. ``kl`` is None without a reference."""

    model: str
    text: Sequence[str]
    parameters: int
    tokens: int
    perplexity: float
    kl: float | None


def config_of(body: Mapping[str, object]) -> SearchConfig:
    """A SearchConfig from plain data. Raises ConfigError naming the field instead of pydantic's error."""
    try:
        return SearchConfig.model_validate(dict(body))
    except ValidationError as error:
        raise from_problems(error.errors(), field_names()) from None


def search(
    rate: float,
    directory: Path | str,
    *,
    cache: Path | None = None,
    proposers: Mapping[str, ProposerSettings] | None = None,
    watch: Watch | None = None,
    again: bool = False,
    devices: str | Sequence[str] | None = None,
    ray: str | None = None,
    progress: bool | OnProgress = True,
    **fields: object,
) -> JobResult:
    """Search for the best plan and leave it in ``directory``: ``checkpoint/``, ``result.json``, ``selfpruner.db``.

    ``fields`` are those of SearchConfig (``model``, ``preset``, ...). The same call again resumes an interrupted search, and gives
    what a finished one found (``reused``) without computing anything. Other settings are another search beside it:
    ``checkpoint-2/``, ``result-2.json``; ``again`` is one with the same settings. ``watch`` is called with what a server's event
    stream sends, see ``Client.follow``: a name and plain data, ``job`` and the job, or the type of an event and the event.
    If it raises, the search stops, its job waits for the same call as after Ctrl-C, and the exception is raised here.

    Raises what can be known before of texts, places and names before anything is computed.
    """
    from selfpruner.jobs.live_view import Listener, watched, watching

    config = config_of({"rate": rate, **fields})
    listener = Listener(watch or (lambda _name, _data: None))
    where = placed(devices, config.device, ray)
    named = {"local": ProposerSettings(), **(proposers or {})}
    if "llm" in config.needs:
        catalogue.check_proposer(config.proposer, named)
    folder, cache_dir = Path(directory), cache or default_cache()
    runs.refuse(folder, config)
    places.writable_folder(cache_dir, param="cache")
    files.look_at(config, ("fitness", "report"))
    with Store(folder / runs.DATABASE) as store:
        store.requeue_running()  # what was killed
        run = runs.find(store, folder, config, again=again)
        if run.done is not None:
            assert run.job.result is not None
            if not run.result.is_file():
                run.write_result(run.job.result)
            recorded = cast(MadeCheckpoint, checkpoint_facts(run.done))  # its seconds are not known any more
            return JobResult(run.job.result, {**recorded, "path": str(run.checkpoint)}, reused=True)

        async def work(pool: WorkerPool) -> JobResult:
            life = JobLife(store, run.job, run.checkpoint)
            life.begin(
                lambda: run_job(
                    config,
                    job_id=life.id,
                    pool=pool,
                    proposer_settings=named,
                    recorder=store.recorder(life.id),
                    cache=cache_dir,
                    checkpoint_dir=run.checkpoint,
                )
            )
            loop = asyncio.get_running_loop()
            listener.on_error = lambda: loop.call_soon_threadsafe(life.stop, "queued")
            if listener.error is not None:
                life.stop("queued")
            try:
                await life.attend()
            finally:
                listener.on_error = lambda: None  # the loop ends
            if listener.error is not None:
                raise listener.error
            return life.result()

        with watched(f"{config.model} rate {config.rate:g}", progress) as view:
            store.on_event = store.on_progress = watching(store, run.job.id, [view, listener])
            try:
                result = _with_pool(work, devices=where, ray=ray)
            finally:
                store.requeue_running()  # a signal may come before the job is attended to
    run.write_result(result.report)
    return result


def prune(
    directory: Path | str,
    *,
    rate: float | None = None,
    rates: Sequence[float] | None = None,
    levels: Sequence[int] | None = None,
    cache: Path | None = None,
    devices: str | Sequence[str] | None = None,
    ray: str | None = None,
    progress: bool | OnProgress = True,
    **fields: object,
) -> Pruned:
    """Apply one plan without a search: uniform at ``rate``, given ``rates`` (per layer or block), or exact ``levels``.

    ``rates`` are projected onto the budget of ``rate`` (their own average over the decoder when no rate is given).
    """
    if sum(given is not None for given in (rates, levels)) > 1:
        raise ConfigError("Give rates or levels, not both.", param="rates")
    if rate is None:
        if rates is None and levels is None:
            raise ConfigError("Say what to remove: rate, rates or levels.", param="rate")
        rate = _average(rates) if rates is not None else 1e-6
    config = config_of({"rate": rate, "preset": "evolution", **fields})
    where = placed(devices, config.device, ray)
    from selfpruner import models
    from selfpruner.export.card import named
    from selfpruner.export.folder import refuse_place

    models.precheck(config.model)
    known = {name: getattr(config, name) for name in ("of", "pattern", "criterion", "compensation")}
    given = {"rate": config.rate} if levels is None else {"levels": list(levels)}
    refuse_place(Path(directory), {"base_model": named(config.model), **known, **given})

    def choose(space: SearchSpace) -> Plan:
        if levels is None:
            return space.project(list(rates) if rates is not None else [config.rate] * space.layers)
        plan = Plan(tuple(levels))
        space.check(plan)
        return plan

    async def run(pool: WorkerPool) -> Pruned:
        return await _write(pool, config, cache or default_cache(), choose, Path(directory), None, tell)

    with shown(progress) as tell:
        return _with_pool(run, devices=where, ray=ray)


def export(
    source: Path | str,
    directory: Path | str,
    *,
    format: str = "transformers",
    quantize: str | None = None,
    tensor_parallel: int = 1,
    job: str | None = None,
    plan: str | None = None,
    cache: Path | None = None,
    progress: bool | OnProgress = True,
) -> Pruned:
    """Write a checkpoint, or any plan of a finished or unfinished search, in one of the formats of ``catalogue.FORMATS``.

    ``source`` is a checkpoint's folder, that of a model which was saved later (trained further, say), or the folder or database of
    a search; of that, ``job`` defaults to the newest one, ``plan`` (a hash) to its best. Raises NotFoundError, and FormatError
    for what the format cannot take.
    """
    how: Conversion = {"quantize": quantize, "tensor_parallel": tensor_parallel}
    catalogue.check("export format", format, catalogue.FORMATS, param="format")
    from selfpruner.export.folder import refuse_place

    if Path(source).resolve() != Path(directory).resolve():
        refuse_place(Path(directory))
    if (Path(source) / MANIFEST).is_file():
        if job is not None or plan is not None:
            raise ConfigError(
                f"{source} is one checkpoint: leave out job and plan, or name the folder of its search.", param="plan"
            )
        with shown(progress) as tell:
            return _convert(Path(source), Path(directory), format, how, tell)
    if saved.is_saved(Path(source)):
        if job is not None or plan is not None:
            raise ConfigError(f"{source} is one model: leave out job and plan, or name the folder of its search.", param="plan")
        with shown(progress) as tell:
            return _adopted(Path(source), Path(directory), format, how, tell)
    if format == "transformers" and quantize is None and tensor_parallel == 1:
        with shown(progress) as tell:
            return _made(source, Path(directory), job, plan, cache, tell)
    from selfpruner.export import formats
    from selfpruner.export.base import Origin
    from selfpruner.export.folder import aside

    form = formats.asked(format, quantize, tensor_parallel)

    def precheck(config: SearchConfig, family: str) -> None:
        form.precheck(Origin(family, config.pattern, config.compensation), quantize)

    with aside(Path(directory).absolute()) as scratch, shown(progress) as tell:
        made = _made(source, scratch / "checkpoint", job, plan, cache, tell, precheck)
        return _convert(made.path, Path(directory), format, how, tell)


def _adopted(source: Path, directory: Path, format: str, how: Conversion, progress: OnProgress) -> Pruned:
    """A model that no export wrote, first made a checkpoint."""
    from selfpruner.export import formats
    from selfpruner.export.adopt import adopt
    from selfpruner.export.folder import aside

    formats.asked(format, how["quantize"], how["tensor_parallel"])
    progress("making a checkpoint of a saved model")
    if format == "transformers" and how["tensor_parallel"] == 1:
        return _read(adopt(source, directory))
    with aside(directory.absolute()) as scratch:
        return _convert(adopt(source, scratch / "checkpoint").path, directory, format, how, progress)


def _convert(source: Path, directory: Path, format: str, how: Conversion, progress: OnProgress) -> Pruned:
    from selfpruner.export import formats

    progress(f"writing the format {format}")
    return _read(formats.convert(source, directory, format, progress=progress, **how))


def _read(result: Exported) -> Pruned:
    made = json.loads((result.path / "plan.json").read_text("utf-8"))
    return Pruned(result.path, manifest.kept(made), Plan(tuple(made["levels"])), made["layer_rates"], result.verification)


def _made(
    source: Path | str,
    directory: Path,
    job: str | None,
    plan: str | None,
    cache: Path | None,
    progress: OnProgress,
    precheck: Callable[[SearchConfig, str], None] = lambda _config, _family: None,
) -> Pruned:
    """The checkpoint of a plan in a database, made now. Before that takes its time, ``precheck`` is called with the config and the
    model's family of a search that has finished."""
    from selfpruner.export.card import named
    from selfpruner.export.folder import refuse_place

    database = runs.database(source, f"{source} is no checkpoint (a folder with {MANIFEST}), and there")
    with runs.reading(database) as store:
        newest = store.jobs(limit=1).data
        if job is None and not newest:
            raise NotFoundError(f"{database} holds no job yet.", param="source")
        row = store.job(job) if job is not None else newest[0]
        chosen = plan or (row.result or {}).get("best_plan")
        if chosen is None:
            ranked = store.candidates(row.id, limit=1, order="fitness").data
            if not ranked:
                raise NotFoundError(f"Job {row.id} has no scored plan yet.", param="plan")
            chosen = ranked[0].plan_hash
        levels = store.candidate(row.id, chosen, param="plan").levels
    config = config_of(row.config)
    if row.result is not None:
        precheck(config, row.result["model"]["family"])
    refuse_place(directory, {"plan_hash": Plan(tuple(levels)).hash, "base_model": named(config.model)})

    async def run(pool: WorkerPool) -> Pruned:
        return await _write(pool, config, cache or default_cache(), lambda _: Plan(tuple(levels)), directory, row.id, progress)

    return _with_pool(run)


def evaluate(
    model: Path | str,
    *,
    text: Sequence[str] = ("auto",),
    sequences: int = 32,
    length: int = 512,
    against: str | None = None,
    device: str = "auto",
    devices: str | Sequence[str] | None = None,
    memory: int | str | None = None,
    cache: Path | None = None,
    progress: bool | OnProgress = True,
) -> ModelScore:
    """Perplexity of a dense model or a checkpoint on the report part of ``text``, and its KL from the model ``against``. ``memory``
    (bytes, or 2GiB say) bounds what both and the work with them may take; larger models are streamed from their files."""
    from selfpruner.judging.held_out import held_out

    where = placed(devices, device)
    cache_dir = cache or default_cache()
    wanted = TextConfig(sources=tuple(Source(source=name) for name in text), sequences=sequences, length=length)
    files.check(wanted, "text")
    places.writable_folder(cache_dir, param="cache")
    for name in (str(model), *([] if against is None else [against])):
        saved.precheck(name)

    async def run(pool: WorkerPool) -> ModelScore:
        session = _judged(str(model), device, "auto", ceiling, length, cache_dir)
        score = await held_out(pool, session, wanted, against, tell)
        return ModelScore(str(model), list(score.sources), score.parameters, score.tokens, score.perplexity, score.kl)

    ceiling = _ceiling(memory)
    with shown(progress) as tell:
        return _with_pool(run, _JUDGE, where)


def quality(
    subjects: Sequence[Path | str],
    file: Path | str,
    *,
    tasks: Sequence[str] = (),
    perplexity: Sequence[str] = (),
    seqlen: Sequence[int] = (2048,),
    generation: bool = False,
    limit: int | None = None,
    windows: int | None = None,
    against: Path | str | None = None,
    data: Path | str | None = None,
    device: str = "auto",
    devices: str | Sequence[str] | None = None,
    dtype: str = "auto",
    memory: int | str | None = None,
    cache: Path | None = None,
    progress: bool | OnProgress = True,
) -> Quality:
    """Measure models and checkpoints as papers report them: zero-shot ``tasks`` (names of the harness), ``perplexity`` on
    ``wikitext2`` and ``c4`` in windows of ``seqlen`` tokens, and a ``generation`` probe.

    Every result is written to ``file`` as soon as it is there; the same call goes on where it stopped. ``limit`` documents of each
    task and ``windows`` of each text are taken, the same for every model; None takes all. ``against`` is the model the others are
    compared with, by default the first. ``data`` is a folder with local task files and texts, by default ``$SELFPRUNER_DATA``.
    ``memory`` bounds what a model and the work with it may take; of a larger one perplexity is streamed, and the rest is refused.

    Raises ConfigError (nothing asked for, an unknown name, no harness, ``file`` holds something else), TextError for data that
    cannot be had, and what loading a model raises.
    """
    from selfpruner.judging import measures
    from selfpruner.judging.quality import MeasurementFile, Quality, measure

    for text in perplexity:
        catalogue.check("text", text, catalogue.PERPLEXITY_TEXTS, param="perplexity")
    if any(length < 2 for length in seqlen) or not seqlen:
        raise ConfigError("seqlen must be windows of two tokens or more, such as 128,512,2048.", param="seqlen")
    folder = data if data is not None else os.environ.get("SELFPRUNER_DATA")
    data_folder = Path(folder) if folder else None
    wanted: list[measures.Measure] = [measures.TaskAccuracy(name, limit, data_folder) for name in dict.fromkeys(tasks)]
    wanted += [
        measures.Perplexity(text, length, windows, data_folder)
        for text in dict.fromkeys(perplexity)
        for length in dict.fromkeys(seqlen)
    ]
    wanted += [measures.RepetitionProbe()] if generation else []
    if not wanted or not subjects:
        raise ConfigError("Say what to measure: models, and tasks, perplexity or generation.", param="tasks")
    if tasks:
        measures.harness_version()
    places.writable_file(Path(file))
    results = MeasurementFile(Path(file))
    compared = str(against) if against is not None else str(subjects[0])
    asked = tuple(dict.fromkeys((compared, *map(str, subjects))))
    for name in asked:
        saved.precheck(name)
    catalogue.check_device(device)
    where = placed(devices, device)
    longest = max(seqlen) if perplexity else measures.NEW_TOKENS
    ceiling, kept = _ceiling(memory), cache or default_cache()
    sessions = {name: _judged(name, device, dtype, ceiling, longest, kept) for name in asked}

    async def run(pool: WorkerPool) -> Quality:
        return Quality(asked, compared, await measure(pool, sessions, wanted, results, progress=tell))

    with shown(progress) as tell:
        return _with_pool(run, _JUDGE, where)


def benchmark(
    models: Sequence[str | Path],
    *,
    backend: str = "transformers",
    urls: Sequence[str] = (),
    key: str | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int = 64,
    repetitions: int = 7,
    compiled: bool = False,
    device: str = "auto",
    devices: str | Sequence[str] | None = None,
    dtype: str = "auto",
    memory: int | str | None = None,
    cache: Path | None = None,
    progress: bool | OnProgress = True,
) -> BenchmarkReport:
    """Speed of dense models and checkpoints, in turn in one run; the first is what the others are compared with.

    ``backend`` is one of ``catalogue.BACKENDS``: ``vllm`` needs ``urls`` of running servers and perhaps a ``key``; the folders
    still have to be here, for the bounds. ``prompt_tokens`` are 512 by default, or as many as all models have positions for.
    ``memory`` bounds what all models together may take; what would have to be streamed is refused. ``compiled`` decodes by
    torch.compile with a cache of fixed size. With several ``devices`` the models are put on them in turn, and still timed one at a
    time. ``BenchmarkReport.markdown()`` and ``BenchmarkReport.to_dict()`` say what was seen.
    """
    from selfpruner.timing import run as timing

    named = [str(model) for model in models]
    if len(set(named)) < len(named):
        raise ConfigError("Every model can be named once only.", param="models")
    where = placed(devices, device)
    settings = Settings(backend, 512 if prompt_tokens is None else prompt_tokens, new_tokens, repetitions, compiled=compiled)
    wanted = {name: name for name in named}
    with shown(progress) as tell:
        return asyncio.run(
            timing.run(
                wanted,
                settings,
                urls=urls,
                key=key,
                devices=where or (device,),
                dtype=dtype,
                memory=_ceiling(memory),
                cache=cache or default_cache(),
                shorten=prompt_tokens is None,
                progress=tell,
            )
        )


async def _write(
    pool: WorkerPool,
    config: SearchConfig,
    cache: Path,
    choose: Callable[[SearchSpace], Plan],
    directory: Path,
    job: str | None,
    progress: OnProgress,
) -> Pruned:
    """The checkpoint of the one plan that ``choose`` takes from the space, for which no other is made ready."""
    session, prepared, plan = await _ready(pool, config, cache, choose, directory, progress)
    told = card(config, prepared, prepared.space, plan, job_id=job)
    result = await pool.run(session, ExportRequest(plan=plan.levels, directory=str(directory), card=told), progress)
    return Pruned(Path(result.path), result.parameters, plan, prepared.space.layer_rates(plan), result.verification)


async def _ready(
    pool: WorkerPool,
    config: SearchConfig,
    cache: Path,
    choose: Callable[[SearchSpace], Plan],
    directory: Path,
    progress: OnProgress,
) -> tuple[Session, PrepareResult, Plan]:
    """A session in which a plan is ready, what a worker says of it, and the plan.

    Where whole units go, a criterion's order gives all levels at once. Where weights become zero every level is work of its own, so
    the plan is chosen from what levels should keep, and only its own are made. What they really keep may be some weights less or
    more (a criterion may count by rows); where the plan then misses the budget another one is chosen.
    """
    whole = session_of(config, cache)
    asked = PrepareRequest(texts=("calibration",), output=str(directory))
    if catalogue.PATTERNS[config.pattern].zeros:
        space = (await pool.run(whole, ExpectRequest(output=str(directory)), progress)).space
        for _ in range(3):
            plan = choose(space)
            session = session_of(config, cache, plan)
            prepared = await pool.run(session, asked, progress)
            space = prepared.space
            if space.meets_budget(plan) or choose(space) == plan:
                return session, prepared, plan
    await split.measure(pool, whole, asked, progress)
    prepared = await pool.run(whole, asked, progress)
    return whole, prepared, choose(prepared.space)


def _judged(model: str, device: str, dtype: str, memory: int | None, tokens: int, cache: Path) -> Session:
    from selfpruner.judging.tasks import Judged

    config = Judged(model=model, device=device, dtype=dtype, memory=memory, tokens=tokens).to_json()
    return Session(json.dumps(config), config, str(cache))


def _ceiling(memory: int | str | None) -> int | None:
    """Bytes. Raises ConfigError for what is no size."""
    try:
        return TypeAdapter[int | None](Bytes | None).validate_python(memory)
    except ValidationError as error:
        problem = {**error.errors()[0], "loc": ("memory",)}
        raise from_problems([problem]) from None


def placed(devices: str | Sequence[str] | None, device: str, ray: str | None = None) -> tuple[str, ...] | None:
    """A device for each worker process, all of which are here, or of every node of the cluster ``ray``; None for a worker in this
    process."""
    if devices is None:
        return None if ray is None else (device,)
    if device != "auto":
        raise ConfigError("Give device or devices, not both.", param="devices")
    found = workers.parse(devices)
    if ray is None:
        workers.check_here(found)
    return found


def _with_pool(
    work: Callable[[WorkerPool], Coroutine[object, None, T]],
    handler: str = _SEARCH,
    devices: Sequence[str] | None = None,
    ray: str | None = None,
) -> T:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # of use where torch is not imported yet, as on the command line

    async def run() -> T:
        pool = _pool(handler, devices, ray)
        try:
            return await work(pool)
        finally:
            await pool.close()

    try:
        return asyncio.run(run())
    except KeyboardInterrupt as error:
        error.add_note("Interrupted. What was computed is kept: the same call goes on from there.")
        raise


def _pool(handler: str, devices: Sequence[str] | None, ray: str | None) -> WorkerPool:
    if ray is not None:
        from selfpruner.workers.ray_pool import RayPool

        return RayPool(ray, devices=devices or ("auto",), handler=handler)
    if devices is not None:
        from selfpruner.workers.process_pool import ProcessPool

        return ProcessPool(devices, handler=handler)
    from selfpruner.workers.thread_pool import InProcessPool

    return InProcessPool(lambda: load_handler(handler, "auto"))


def _average(rates: Sequence[float]) -> float:
    if not rates:
        raise ConfigError("rates is empty; give one number per layer.", param="rates")
    return min(max(math.fsum(rates) / len(rates), 1e-6), 1 - 1e-6)
