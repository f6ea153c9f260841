"""Models timed in turn: A B A B ..., measure by measure, so that a machine whose speed drifts slows all of them.

Each model has a process of its own (``transformers``, ``llamacpp``); all are there at once, and only one works at a time. Or it is
behind a server that runs already (``vllm``). One round warms up; the others are paired repetitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from selfpruner import catalogue
from selfpruner.errors import ConfigError
from selfpruner.progress import OnProgress
from selfpruner.timing.report import BenchmarkReport, Settings, TimedModel, decode
from selfpruner.timing.tasks import (
    DecodeRequest,
    DecodeResult,
    GgufConfig,
    LoadRequest,
    LoadResult,
    MemoryRequest,
    MemoryResult,
    PrefillRequest,
    PrefillResult,
    TransformersConfig,
)
from selfpruner.workers.base import Session
from selfpruner.workers.process_pool import ProcessPool
from selfpruner.workers.tasks import Contract

# A name, a folder, a file, or the fields of a config, whose model gets random weights.
Model = str | Mapping[str, JsonValue]
_HANDLERS = {
    "transformers": "selfpruner.timing.transformers_model:TransformersTimer",
    "llamacpp": "selfpruner.timing.llamacpp_model:LlamaCppTimer",
}
# Tokens written by the round that warms up.
_WARM = 4


class Timed(Protocol):
    """One model that can be timed."""

    async def load(self, memory: int | None) -> LoadResult: ...

    async def prefill(self, request: PrefillRequest) -> PrefillResult: ...

    async def decode(self, request: DecodeRequest) -> DecodeResult: ...

    async def memory(self) -> MemoryResult: ...

    async def close(self) -> None: ...


class TimedProcess:
    """A model in a child process. Its libraries start with their own settings, not with a worker's: what users get is timed."""

    def __init__(self, backend: str, device: str, config: Contract, cache: Path, progress: OnProgress) -> None:
        self._pool = ProcessPool([device], handler=_HANDLERS[backend], max_attempts=1, environment={})
        self._session = Session(str(config), config.to_json(), str(cache))
        self._progress = progress

    async def load(self, memory: int | None) -> LoadResult:
        return await self._pool.run(self._session, LoadRequest(memory=memory), self._progress)

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        return await self._pool.run(self._session, request)

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        return await self._pool.run(self._session, request)

    async def memory(self) -> MemoryResult:
        return await self._pool.run(self._session, MemoryRequest())

    async def close(self) -> None:
        await self._pool.close()


class Served:
    """A model behind a server. ``facts`` come from its own folder, since a server does not tell them."""

    def __init__(self, url: str, name: str, facts: LoadResult, vocabulary: int, key: str | None) -> None:
        from selfpruner.timing.served_model import Server

        self._facts = facts
        self._server = Server(url, name, vocabulary, key=key)
        self._url = url

    async def load(self, memory: int | None) -> LoadResult:  # noqa: ARG002 - the server's memory is its own
        return self._facts.model_copy(update={"device": f"{self._url} ({await self._server.model()})"})

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        return await self._server.prefill(request)

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        return await self._server.decode(request)

    async def memory(self) -> MemoryResult:
        return MemoryResult(mib=None, of=None)

    async def close(self) -> None:
        await self._server.close()


async def measure(
    subjects: Mapping[str, Timed],
    settings: Settings,
    *,
    memory: int | None = None,
    shorten: bool = False,
    progress: OnProgress = lambda _: None,
) -> BenchmarkReport:
    """Time all ``subjects`` (by name, the first is what the others are compared with), whose weights take at most ``memory`` bytes
    together.

    Raises what loading them raises; ConfigError when prompt and new tokens are more than a model has positions for, unless
    ``shorten`` allows a prompt that fits all of them.
    """
    facts: dict[str, LoadResult] = {}
    for name, subject in subjects.items():
        progress(f"loading {name}")
        taken = sum(fact.work.weight_bytes for fact in facts.values())
        facts[name] = await subject.load(None if memory is None else memory - taken)
        room = facts[name].limit - settings.new_tokens
        if shorten and 0 < room < settings.prompt_tokens:
            settings = replace(settings, prompt_tokens=room)
        elif room < settings.prompt_tokens:
            raise ConfigError(
                f"{settings.prompt_tokens} and {settings.new_tokens} tokens are more than the {facts[name].limit} positions of "
                f"{name}. Use a shorter prompt or fewer new tokens.",
                param="prompt_tokens",
            )
    if len(kinds := {fact.dtype for fact in facts.values()}) > 1 and settings.backend != "llamacpp":
        raise ConfigError(f"The models would run in {' and '.join(sorted(kinds))}; say --dtype to run all in one.", param="dtype")
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in subjects}
    tokens: dict[str, dict[str, list[int]]] = {name: {} for name in subjects}

    def note(name: str, measure: str, count: int, took: float) -> None:
        seconds[name].setdefault(measure, []).append(took)
        tokens[name].setdefault(measure, []).append(count)

    for round_ in range(settings.repetitions + 1):
        progress(f"repetition {round_} of {settings.repetitions}" if round_ else "warming up")
        for name, subject in subjects.items():
            read = await subject.prefill(PrefillRequest(tokens=settings.prompt_tokens))
            if round_:
                note(name, "prefill", settings.prompt_tokens, read.seconds)
                note(name, "first_token", settings.prompt_tokens, read.first_token)
        for batch in settings.batches:
            for name, subject in subjects.items():
                new_tokens = settings.new_tokens if round_ or settings.compiled else min(settings.new_tokens, _WARM)
                asked = DecodeRequest(batch=batch, prompt=settings.prompt_tokens, new_tokens=new_tokens)
                written = await subject.decode(asked)
                if round_:
                    note(name, decode(batch), written.tokens, written.seconds)
    rows = []
    for name, subject in subjects.items():
        held, peak = facts[name], await subject.memory()
        rows.append(
            TimedModel(
                name=name,
                work=held.work,
                device=held.device,
                dtype=held.dtype,
                threads=held.threads,
                peak_mib=peak.mib,
                base_mib=held.base_mib,
                peak_of=peak.of,
                seconds=seconds[name],
                tokens=tokens[name],
            )
        )
    return BenchmarkReport(settings, tuple(rows))


async def run(
    models: Mapping[str, Model],
    settings: Settings,
    *,
    urls: Sequence[str] = (),
    key: str | None = None,
    devices: Sequence[str] = ("auto",),
    dtype: str = "auto",
    memory: int | None = None,
    cache: Path,
    shorten: bool = False,
    progress: OnProgress = lambda _: None,
) -> BenchmarkReport:
    """Time models by name. ``memory``: bytes that the weights of all may take at once. ``urls``: of ``vllm``'s servers, one for
    each model or one for all; ``key`` is sent to them. The models are put on the ``devices`` in turn.

    Raises ConfigError and UnknownNameError for what cannot be asked, ModelError and its kin for what cannot be loaded,
    BenchmarkError for a runtime that is not there or fails.
    """
    check(models, settings, urls)
    if memory is not None and settings.backend == "vllm":
        raise ConfigError("A server that runs already has its own memory; leave --memory out.", param="memory")
    subjects: dict[str, Timed] = {}
    try:
        for index, (name, model) in enumerate(models.items()):
            device = devices[index % len(devices)]
            if settings.backend == "vllm":
                subjects[name] = _served(urls[index % len(urls)], model, dtype, cache, key)
            elif settings.backend == "llamacpp":
                subjects[name] = _gguf(name, settings, device, dtype, cache, progress)
            else:
                fields = model if isinstance(model, str) else dict(model)
                config = TransformersConfig(model=fields, dtype=dtype, compiled=settings.compiled)
                subjects[name] = TimedProcess("transformers", device, config, cache, progress)
        return await measure(subjects, settings, memory=memory, shorten=shorten, progress=progress)
    finally:
        for subject in subjects.values():
            await subject.close()


def check(models: Mapping[str, Model], settings: Settings, urls: Sequence[str]) -> None:
    """Raise ConfigError for numbers and combinations that make no run."""
    catalogue.check("backend", settings.backend, catalogue.BACKENDS)
    if not models:
        raise ConfigError("Name at least one model; the first is what the others are compared with.", param="models")
    for field in ("prompt_tokens", "new_tokens", "repetitions"):
        if getattr(settings, field) < 1:
            raise ConfigError(f"{field} must be at least 1.", param=field)
    if settings.backend == "vllm" and len(urls) not in (1, len(models)):
        raise ConfigError(
            f"vllm needs the address of a running server for each of the {len(models)} models, or one that serves all: --url http://...",
            param="url",
        )
    if settings.backend != "vllm" and urls:
        raise ConfigError(f"{settings.backend} runs here and takes no --url; did you mean --backend vllm?", param="url")
    if settings.compiled and settings.backend != "transformers":
        raise ConfigError("Only --backend transformers can be compiled.", param="compile")


def _gguf(name: str, settings: Settings, device: str, dtype: str, cache: Path, progress: OnProgress) -> TimedProcess:
    from selfpruner.timing import llamacpp_model

    if dtype != "auto":
        raise ConfigError("A GGUF file has its own types; leave --dtype out, or export it with another --quantize.", param="dtype")
    config = GgufConfig(
        model=str(llamacpp_model.file_of(name)),
        sequences=max(settings.batches),
        context=settings.prompt_tokens + settings.new_tokens,
    )
    return TimedProcess("llamacpp", "cpu" if device == "auto" else device, config, cache, progress)


def _served(url: str, model: Model, dtype: str, cache: Path, key: str | None) -> Served:
    """Counts are those of the model's folder on this machine, in ``dtype`` or its own."""
    from selfpruner.timing import transformers_model

    if not isinstance(model, str):
        raise ConfigError("A server has no model of random weights; name what it serves.", param="models")
    facts, vocabulary = transformers_model.outline(model, dtype, cache)
    return Served(url, model, facts, vocabulary, key)
