"""The torch side of a worker: prepares sessions and does their tasks. See :mod:`selfpruner.workers.tasks` for the kinds.

The loaded model is kept between sessions that share it; one session's texts, factors and engine are kept at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from selfpruner import models
from selfpruner.architectures import describe
from selfpruner.architectures.cost import decoder_parameters, model_parameters
from selfpruner.calibration import files
from selfpruner.catalogue import PATTERNS
from selfpruner.config import Role, SearchConfig
from selfpruner.errors import CalibrationError, ConfigError, ModelNotFoundError, OutOfMemoryError, ProposerError
from selfpruner.evaluation import speed
from selfpruner.evaluation.latency import time_blocks
from selfpruner.evaluation.race import Race
from selfpruner.evaluation.session import Prepared, baseline_engine, check, forget_plan, prepare, text_of
from selfpruner.evaluation.slopes import slopes
from selfpruner.evaluation.split import row_of
from selfpruner.evaluation.tally import Tally
from selfpruner.export.build import build, check_buildable, count_parameters
from selfpruner.export.card import with_origin
from selfpruner.export.checkpoint import write
from selfpruner.export.folder import refuse_place
from selfpruner.export.pruned import kept_units, needs_files, pruned_tensors, streamed_export, zeros
from selfpruner.files import cache_folder, places
from selfpruner.files.report import SourceUsed
from selfpruner.judging.repetition import repetition
from selfpruner.models import LoadedModel
from selfpruner.models.checks import sampled_digest
from selfpruner.models.memory import release
from selfpruner.planning.space import Plan
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.pruning.blocks import collect_part, make_layers, measurements, shares
from selfpruner.pruning.measurements import Measurements, held_bytes
from selfpruner.pruning.search_space import expected_space
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import (
    BaselineRequest,
    BaselineResult,
    BeginRequest,
    BeginResult,
    EvaluateRequest,
    EvaluateResult,
    ExpectRequest,
    ExpectResult,
    ExportRequest,
    ExportResult,
    GenerateRequest,
    GenerateResult,
    MakeRequest,
    MakeResult,
    MeasureRequest,
    MeasureResult,
    MeasureRow,
    ModelFacts,
    PrepareRequest,
    PrepareResult,
    ProposeRequest,
    ProposeResult,
    R,
    RaceTerms,
    SequenceSums,
    SlopesRequest,
    SlopesResult,
    StatisticsRequest,
    StatisticsResult,
    TaskRequest,
    TaskResult,
    TextFacts,
    TimeBlocksRequest,
    TimeBlocksResult,
)

# Tokens that every model writes in each of the rounds it is timed in.
TIMED_TOKENS = 16


class SessionHandler:
    """Does tasks on one device, one at a time. ``model_root`` bounds local models and ``text_root`` text files (None: any)."""

    def __init__(self, device: str = "auto", *, model_root: Path | None = None, text_root: Path | None = None) -> None:
        self.device = device
        self.model_root = model_root
        self.text_root = text_root
        self._loaded: tuple[tuple[str, str, str, int | None], LoadedModel] | None = None
        self._prepared: tuple[str, Prepared] | None = None
        self._files: dict[str, str] = {}  # of its texts, as they were then
        self._tasks: dict[type[TaskRequest[TaskResult]], Callable[..., Any]] = {
            BeginRequest: self._begin,
            StatisticsRequest: self._statistics,
            MakeRequest: self._make,
            PrepareRequest: self._prepare,
            ExpectRequest: self._expect,
            EvaluateRequest: self._evaluate,
            SlopesRequest: self._slopes,
            BaselineRequest: self._baseline,
            ProposeRequest: self._propose,
            MeasureRequest: self._measure,
            GenerateRequest: self._generate,
            TimeBlocksRequest: self._time_blocks,
            ExportRequest: self._export,
        }

    @property
    def requests(self) -> Collection[type[TaskRequest[TaskResult]]]:
        return self._tasks

    def handle(self, session: Session, request: TaskRequest[R], progress: OnProgress, cancelled: Cancelled) -> R:
        """Do one task. Raises typed errors; a device out of memory is an OutOfMemoryError."""
        try:
            result: R = self._tasks[type(request)](session, request, progress, cancelled)
            return result
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(f"The device ran out of memory during {request.kind!r}: {error}") from error
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise CalibrationError(
                f"What was measured on the calibration text cannot be factored ({error}). Use a longer or another text, another "
                "criterion, or compensation none."
            ) from error
        finally:
            release()

    # -- holding -----------------------------------------------------------------------------------------------------
    def _model(self, config: SearchConfig, cache: Path, progress: OnProgress) -> LoadedModel:
        device = self.device if config.device == "auto" else config.device
        key = (config.model, device, config.dtype, config.memory)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = self._prepared = None  # never two models at once
            progress(f"loading {config.model}")
            source = models.resolve(config.model, cache, allowed_root=self.model_root)
            self._loaded = key, models.load(source, device, config.dtype, config.memory)
        return self._loaded[1]

    def _session(
        self, session: Session, progress: OnProgress, cancelled: Cancelled, roles: Sequence[Role] = (), output: str | None = None
    ) -> Prepared:
        if self._prepared is None or self._prepared[0] != session.key:
            config, cache, loaded = self._ready(session, progress, roles, output)
            self._prepared = session.key, prepare(config, loaded, cache, roles, progress, cancelled, _plan_of(session))
        return self._prepared[1]

    def _ready(
        self, session: Session, progress: OnProgress, roles: Sequence[Role] = (), output: str | None = None
    ) -> tuple[SearchConfig, Path, LoadedModel]:
        """The model of a session that takes the place of the present one, after a look at what can be wrong."""
        self._prepared = None
        cache_folder.let_go(keep=[self._loaded[1].source.folder] if self._loaded else [])
        config, cache = self._looked_at(session, roles)
        loaded = self._model(config, cache, progress)
        check_buildable(loaded.model)
        self._files = _digests(config)
        if output is not None:
            size = sum(parameter.nbytes for parameter in loaded.model.parameters())
            places.room_for(size, Path(output), "The checkpoint")
        return config, cache, loaded

    def _looked_at(self, session: Session, roles: Sequence[Role]) -> tuple[SearchConfig, Path]:
        """Config and cache of the session, after a look at what can be wrong: a model is fetched, converted and read later."""
        config, cache = SearchConfig.model_validate(dict(session.config)), Path(session.cache)
        cache_folder.limit()
        models.choose_device(self.device if config.device == "auto" else config.device)
        places.writable_folder(cache, param="cache")
        files.look_at(config, roles, self.text_root)
        return config, cache

    def _forget_what_changed(self, session: Session) -> None:
        """A job begins with what its names stand for now, also where another one has left the worker warm."""
        config = SearchConfig.model_validate(dict(session.config))
        if self._loaded is not None and self._loaded[0][0] == config.model:
            with suppress(ModelNotFoundError):  # gone, or its hub out of reach: what is held will do
                source = models.resolve(config.model, Path(session.cache), allowed_root=self.model_root)
                if source.fingerprint != self._loaded[1].source.fingerprint:
                    self._loaded = self._prepared = None
        if self._prepared is not None and self._prepared[0] == session.key and self._files != _digests(config):
            self._prepared = None

    # -- tasks -------------------------------------------------------------------------------------------------------
    def _begin(self, session: Session, request: BeginRequest, progress: OnProgress, cancelled: Cancelled) -> BeginResult:
        if request.output is not None:
            refuse_place(Path(request.output))
        self._forget_what_changed(session)
        config, cache, loaded = self._ready(session, progress, request.texts, request.output)
        arch = describe(loaded.model)
        check(config, arch)
        made = {role: text_of(config, role, loaded, cache, progress, cancelled) for role in request.texts}
        if "calibration" not in made:
            return BeginResult(shares=0, layers=())
        parts, layers = shares(config, measurements(arch, loaded, made["calibration"], cache, progress, cancelled), request.workers)
        return BeginResult(shares=parts, layers=layers)

    def _measured(self, session: Session, progress: OnProgress, cancelled: Cancelled) -> tuple[SearchConfig, Measurements]:
        config, cache, loaded = self._ready(session, progress)
        arch = describe(loaded.model)
        text = text_of(config, "calibration", loaded, cache, progress, cancelled)
        return config, measurements(arch, loaded, text, cache, progress, cancelled)

    def _statistics(
        self, session: Session, request: StatisticsRequest, progress: OnProgress, cancelled: Cancelled
    ) -> StatisticsResult:
        started = time.perf_counter()
        config, measured = self._measured(session, progress, cancelled)
        tokens = collect_part(config, measured, request.part, request.parts)
        return StatisticsResult(tokens=tokens, seconds=time.perf_counter() - started)

    def _make(self, session: Session, request: MakeRequest, progress: OnProgress, cancelled: Cancelled) -> MakeResult:
        started = time.perf_counter()
        config, measured = self._measured(session, progress, cancelled)
        make_layers(config, measured, request.layers, request.parts)
        if not request.layers:
            measured.drop_parts(request.parts)
        return MakeResult(seconds=time.perf_counter() - started)

    def _prepare(self, session: Session, request: PrepareRequest, progress: OnProgress, cancelled: Cancelled) -> PrepareResult:
        if request.output is not None:
            refuse_place(Path(request.output))
        self._forget_what_changed(session)
        prepared = self._session(session, progress, cancelled, request.texts, request.output)
        arch, source = prepared.arch, prepared.loaded.source
        texts = {role: prepared.text(role, progress, cancelled) for role in request.texts}
        return PrepareResult(
            space=prepared.space,
            signals=prepared.signals,
            model=ModelFacts(
                name=source.name,
                fingerprint=source.fingerprint,
                family=arch.family,
                layers=arch.layers,
                hidden=arch.hidden,
                heads=arch.heads,
                kv_groups=arch.kv_groups,
                head_dim=arch.head_dim,
                channels=arch.channels,
                parameters=model_parameters(arch),
                decoder_parameters=decoder_parameters(arch),
            ),
            texts={
                role: TextFacts(
                    sources=tuple(
                        SourceUsed(source=share.source, weight=share.weight, sequences=share.sequences) for share in text.sources
                    ),
                    sequences=text.tokens.shape[0],
                    length=text.tokens.shape[1],
                    fingerprint=text.fingerprint,
                )
                for role, text in texts.items()
            },
            dtype=str(arch.dtype).removeprefix("torch."),
            device=str(arch.device),
            streamed=prepared.loaded.streamed,
            seconds=prepared.seconds,
        )

    def _expect(self, session: Session, request: ExpectRequest, progress: OnProgress, cancelled: Cancelled) -> ExpectResult:  # noqa: ARG002
        if request.output is not None:
            refuse_place(Path(request.output))
        config, cache = self._looked_at(session, ())
        return ExpectResult(space=expected_space(config, describe(self._model(config, cache, progress).model)))

    def _evaluate(self, session: Session, request: EvaluateRequest, progress: OnProgress, cancelled: Cancelled) -> EvaluateResult:
        return _scores(self._session(session, progress, cancelled), request, cancelled)

    def _slopes(self, session: Session, request: SlopesRequest, progress: OnProgress, cancelled: Cancelled) -> SlopesResult:
        prepared = self._session(session, progress, cancelled)
        started = time.perf_counter()
        plan = Plan(request.plan)
        for block, level in request.moves:
            prepared.space.check(Plan((*plan.levels[:block], level, *plan.levels[block + 1 :])))
        tokens = prepared.tokens(request.text, request.sequences, request.piece)
        found = slopes(prepared.engine, plan, request.moves, tokens, cancelled=cancelled)
        return SlopesResult(
            kl=found.kl,
            first=tuple(found.first),
            size=tuple(found.size),
            energy=tuple(found.energy),
            tokens=found.tokens,
            seconds=time.perf_counter() - started,
        )

    def _baseline(self, session: Session, request: BaselineRequest, progress: OnProgress, cancelled: Cancelled) -> BaselineResult:
        prepared = self._session(session, progress, cancelled)
        self._prepared = None
        other = baseline_engine(prepared, request.changes, progress, cancelled)
        uniform = other.space.project([other.space.rate] * other.space.layers)
        asked = EvaluateRequest(plans=(uniform.levels,), text=request.text, sequences=request.sequences)
        result = _scores(other, asked, cancelled)
        parameters = model_parameters(prepared.arch) - other.space.removed(uniform)
        return BaselineResult(**result.rows[0].model_dump(), parameters=parameters, seconds=result.seconds)

    def _propose(self, session: Session, request: ProposeRequest, progress: OnProgress, cancelled: Cancelled) -> ProposeResult:
        from selfpruner.proposers import constrained

        config = SearchConfig.model_validate(dict(session.config))
        loaded = self._model(config, Path(session.cache), progress)
        if loaded.streamed:
            raise ProposerError(
                f"{config.model} is streamed from its files, because it does not fit the memory there is: as a proposer it would "
                "read all of them once per word. Name another proposer, or use the preset evolution, which needs none.",
                code="rejected",
            )
        reply = constrained.complete(
            loaded.model,
            loaded.tokenizer,
            request.messages,
            request.reply_schema,
            request.temperature,
            request.max_tokens,
            request.seed,
            cancelled,
        )
        return ProposeResult(model=config.model, **reply)

    def _measure(self, session: Session, request: MeasureRequest, progress: OnProgress, cancelled: Cancelled) -> MeasureResult:
        """Without speed where the models would not fit the memory there is."""
        prepared = self._session(session, progress, cancelled)
        plans = {name: Plan(levels) for name, levels in request.plans.items()}
        dense = model_parameters(prepared.arch)
        parameters = {name: dense - prepared.space.removed(plan) for name, plan in plans.items()}
        if not _fit(prepared, len(plans)):
            rows = {name: MeasureRow(parameters=count) for name, count in parameters.items()}
            return MeasureResult(rows=rows, not_timed="the models to be timed do not fit the memory there is at once")
        built = {name: self._built(prepared, plan) for name, plan in plans.items()}
        prompt = prepared.tokens("report", [0])[0]
        longest, new_tokens = speed.fitting(prompt.numel(), TIMED_TOKENS if request.decode else 0, prepared.arch.positions)
        progress(f"timing {len(built)} models")
        speeds = speed.measure(built, prompt[:longest], new_tokens=new_tokens, cancelled=cancelled)
        return MeasureResult(
            rows={name: MeasureRow(parameters=count, **speeds[name].figures) for name, count in parameters.items()}
        )

    def _generate(self, session: Session, request: GenerateRequest, progress: OnProgress, cancelled: Cancelled) -> GenerateResult:
        """Plans side by side on the cores of a CPU, else one after another."""
        started = time.perf_counter()
        prepared = self._session(session, progress, cancelled)
        if prepared.loaded.streamed:
            raise ConfigError(
                f"{prepared.config.model} is streamed from its files, because it does not fit the memory there is: writing would "
                "read all of them once per word. Set generation_probe to false, or give more memory.",
                param="generation_probe",
            )
        if not _fit(prepared, 1):
            raise OutOfMemoryError("A pruned model does not fit beside the dense one in the memory there is.")
        longest, new_tokens = speed.fitting(request.prompt, request.new_tokens, prepared.arch.positions)
        prompts = prepared.tokens(request.text, request.sequences)[:, :longest]
        rates: dict[str, float] = {}

        def write(name: str, model: PreTrainedModel) -> None:
            rates[name] = repetition(model, prompts, new_tokens=new_tokens, cancelled=cancelled)

        lanes, names = prepared.engine.lanes, list(request.plans)
        together = lanes.count if _fit(prepared, lanes.count) else 1
        for start in range(0, len(names), together):
            some = names[start : start + together]
            progress(f"writing with {' and '.join(some)}")
            built = {name: self._built(prepared, Plan(request.plans[name])) for name in some}
            lanes.run([partial(write, name, model) for name, model in built.items()])
            del built  # before the next are
        return GenerateResult(repetition=rates, seconds=time.perf_counter() - started)

    @staticmethod
    def _built(prepared: Prepared, plan: Plan) -> PreTrainedModel:
        """The plan's model; the dense one is there."""
        base = prepared.loaded.model
        return build(base, *pruned_tensors(prepared, plan)) if any(plan.levels) else base

    def _time_blocks(
        self, session: Session, request: TimeBlocksRequest, progress: OnProgress, cancelled: Cancelled
    ) -> TimeBlocksResult:
        prepared = self._session(session, progress, cancelled)
        progress("timing blocks")
        return TimeBlocksResult(**asdict(time_blocks(prepared, request.tokens, cancelled=cancelled)))

    def _export(self, session: Session, request: ExportRequest, progress: OnProgress, cancelled: Cancelled) -> ExportResult:
        prepared = self._session(session, progress, cancelled)
        plan = Plan(request.plan)
        progress("writing the checkpoint")
        source = None
        if needs_files(prepared.loaded):
            model, source = streamed_export(prepared, plan)
        else:
            model = build(prepared.loaded.model, *pruned_tensors(prepared, plan), dtype=prepared.loaded.written)
        wanted = model_parameters(prepared.arch) - prepared.space.removed(plan)
        found = count_parameters(model)
        origin = prepared.loaded.source
        card = with_origin(
            request.card,
            origin.folder,
            {"model": origin.fingerprint[:16], "calibration": prepared.texts["calibration"].fingerprint},
            base_model=prepared.config.base_model,
            license=prepared.config.license,
        )
        if PATTERNS[prepared.config.pattern].zeros:
            # Shapes stay. A kept weight may be zero by chance, a removed one is nothing else.
            found -= zeros(prepared, plan)
            card = replace(card, nonzeros=wanted)
        if found != wanted if card.nonzeros is None else found > wanted:
            raise ConfigError(f"the built model has {found:,} parameters, the plan says {wanted:,}")
        result = write(
            model,
            prepared.loaded.tokenizer,
            prepared.loaded.source.folder,
            Path(request.directory),
            card,
            units=kept_units(prepared, plan),
            source=source,
            cancelled=cancelled,
            progress=progress,
        )
        if session.plan is not None:
            self._prepared = None
            forget_plan(prepared)
        # What a person is told everywhere: without the zeros of a pattern, which the files' own count has.
        return ExportResult(**{**asdict(result), "path": str(result.path), "parameters": wanted})


def _plan_of(session: Session) -> Plan | None:
    return None if session.plan is None else Plan(tuple(session.plan))


class ServedSessionHandler(SessionHandler):
    """A server's: its requests name models below ``SELFPRUNER_MODEL_ROOT`` and texts below ``SELFPRUNER_TEXT_ROOT`` only. Other
    processes do not read these variables."""

    def __init__(self, device: str = "auto") -> None:
        model_root, text_root = (os.environ.get(f"SELFPRUNER_{kind}_ROOT") for kind in ("MODEL", "TEXT"))
        super().__init__(
            device, model_root=Path(model_root) if model_root else None, text_root=Path(text_root) if text_root else None
        )


def _digests(config: SearchConfig) -> dict[str, str]:
    """The digest of each text of ``config`` that is a file here."""
    texts = (config.calibration, config.fitness_text, config.report_text)
    named = {source.source: Path(os.path.expanduser(source.source)) for text in texts for source in text.sources}
    return {name: sampled_digest(file) for name, file in named.items() if os.path.isfile(file)}


def _fit(prepared: Prepared, count: int) -> bool:
    """Whether ``count`` models can be in memory at once: what they do not share with the dense one is about half of each."""
    if prepared.loaded.memory is None:
        return True
    return (
        not prepared.loaded.streamed and held_bytes(prepared.arch, prepared.loaded) * (1.3 + 0.5 * count) <= prepared.loaded.memory
    )


def _scores(prepared: Prepared, request: EvaluateRequest, cancelled: Cancelled) -> EvaluateResult:
    started = time.perf_counter()
    plans = [Plan(levels) for levels in request.plans]
    for plan in plans:
        prepared.space.check(plan)
    work = prepared.engine.work
    tally = prepared.engine.tally(
        plans,
        prepared.tokens(request.text, request.sequences, request.piece),
        exact=request.text == "report" if request.exact is None else request.exact,
        race=None if request.race is None else _race(request.race),
        cancelled=cancelled,
    )
    after = prepared.engine.work
    return EvaluateResult(
        rows=tuple(row_of(score) for score in tally.scores()),
        seconds=time.perf_counter() - started,
        passes=after.passes - work.passes,
        passes_without_sharing=after.passes_without_sharing - work.passes_without_sharing,
        sums=_sums(tally) if request.sums else None,
    )


def _sums(tally: Tally) -> SequenceSums:
    kl, nll = tally.kl[tally.asked].reshape(len(tally.asked), -1), tally.nll[tally.asked]
    return SequenceSums(length=tally.length, kl=tuple(map(tuple, kl.tolist())), nll=tuple(map(tuple, nll.tolist())))


def _race(terms: RaceTerms) -> Race:
    return Race(terms.keep, terms.contenders, terms.confidence)
