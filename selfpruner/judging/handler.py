"""The worker that judges models by plain forward passes: the torch side of :mod:`selfpruner.judging.tasks`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from selfpruner import models
from selfpruner.calibration.texts import token_batches
from selfpruner.errors import CancelledTaskError, ConfigError, OutOfMemoryError
from selfpruner.judging import perplexity
from selfpruner.judging.loading import load, share
from selfpruner.judging.measures import MeasuredModel, ModelPlace
from selfpruner.judging.tasks import (
    HeldOutRequest,
    HeldOutResult,
    IdentifyRequest,
    IdentifyResult,
    Judged,
    JudgeRequest,
    JudgeResult,
)
from selfpruner.models import saved
from selfpruner.models.memory import release
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import R, TaskRequest, TaskResult


class JudgeHandler:
    """A :class:`~selfpruner.workers.base.TaskHandler` that keeps the model of its last session for further measures."""

    def __init__(self, device: str = "auto") -> None:
        self._device = device
        self._held: tuple[str, MeasuredModel] | None = None
        self._tasks: dict[type[TaskRequest[TaskResult]], Callable[..., TaskResult]] = {
            HeldOutRequest: self._held_out,
            IdentifyRequest: self._identify,
            JudgeRequest: self._judge,
        }

    @property
    def requests(self) -> Collection[type[TaskRequest[TaskResult]]]:
        return self._tasks

    def handle(self, session: Session, request: TaskRequest[R], progress: OnProgress, cancelled: Cancelled) -> R:
        def tell(text: str) -> None:
            if cancelled():
                raise CancelledTaskError("Cancelled during an evaluation.")
            progress(text)

        try:
            return request.answered(self._tasks[type(request)](session, Judged.read(session.config), request, tell))
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(
                f"The device ran out of memory: {error}. Use shorter sequences, another device, or memory to stream the model.",
                param="memory",
            ) from error
        finally:
            release()

    def _place(self, session: Session, judged: Judged) -> ModelPlace:
        device = models.choose_device(self._device if judged.device == "auto" else judged.device)
        return ModelPlace(judged.model, Path(session.cache), device, judged.dtype, judged.memory, judged.tokens)

    def _held_out(self, session: Session, judged: Judged, request: HeldOutRequest, tell: OnProgress) -> HeldOutResult:
        place = self._place(session, judged)
        self._held = None
        tell(f"loading {judged.model}")
        if request.against is None and place.own and "self" in [source.source for source in request.text.sources]:
            raise ConfigError("The dense model writes the text `self`: name it with --against.", param="against")
        names = [judged.model] if request.against is None else [judged.model, request.against]
        room = share(judged.memory, names, place.cache, judged.tokens)
        held = [load(name, place.cache, place.device, judged.dtype, room) for name in names]
        subject, base = held[0], held[-1]
        batches = token_batches(request.text, "report", base, place.cache, 0, tell)
        reference = None if request.against is None else base.model
        tokens = batches.tokens[request.part :: request.parts]
        score = perplexity.score(subject.model, tokens, reference, progress=tell)
        return HeldOutResult(
            sources=tuple(source.source for source in batches.sources),
            parameters=saved.parameters(Path(judged.model), subject.model),
            tokens=score.tokens,
            perplexity=score.perplexity,
            kl=None if math.isnan(score.kl) else score.kl,
        )

    def _identify(self, session: Session, judged: Judged, request: IdentifyRequest, _: OnProgress) -> IdentifyResult:
        place = self._place(session, judged)
        held = {"dtype": str(place.torch_dtype).removeprefix("torch."), "device": place.device.type}
        settings = tuple({**asked.measure.setting, **held} for asked in request.measures)
        return IdentifyResult(fingerprint=place.fingerprint, settings=settings)

    def _judge(self, session: Session, judged: Judged, request: JudgeRequest, tell: OnProgress) -> JudgeResult:
        place = self._place(session, judged)
        if self._held is None or self._held[0] != session.key:
            self._held = None  # never two models at once
            tell("loading")
            self._held = session.key, place.load()
        subject = self._held[1]
        started, worked = time.perf_counter(), time.process_time()
        result = request.measure.measure.run(subject, tell)
        return JudgeResult(
            result=result,
            parameters=saved.parameters(Path(judged.model), subject.model),
            seconds=round(time.perf_counter() - started, 1),
            cpu_seconds=round(time.process_time() - worked, 1),
        )
