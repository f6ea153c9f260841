"""What the worker that judges models is asked and answers; see :mod:`selfpruner.workers.tasks`. Imports no torch.

The session's config is :class:`Judged`: one model, and how it is held.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import JsonValue

from selfpruner.config import TextConfig
from selfpruner.judging.measures import Figures, Measure, Perplexity, RepetitionProbe, TaskAccuracy
from selfpruner.workers.tasks import Contract, TaskRequest, TaskResult


class Judged(Contract):
    """A model by name, folder or hub id. ``memory`` bounds in bytes what it and the work with it may take; ``tokens`` is the
    longest sequence whose logits are held at once."""

    model: str
    device: str
    dtype: str
    memory: int | None
    tokens: int


class HeldOutResult(TaskResult):
    """Perplexity, and KL in nats per token from the other model where there is one. ``sources`` of the text as it was used."""

    sources: tuple[str, ...]
    parameters: int
    tokens: int
    perplexity: float
    kl: float | None


class HeldOutRequest(TaskRequest[HeldOutResult]):
    """Score the model on the report part of ``text``, ``against`` another model; of ``parts`` only the sequences of one, number
    ``part``."""

    kind: ClassVar[str] = "held_out"
    text: TextConfig
    against: str | None
    part: int = 0
    parts: int = 1


class AskedMeasure(Contract):
    """One of them is given."""

    task: TaskAccuracy | None = None
    perplexity: Perplexity | None = None
    generation: RepetitionProbe | None = None

    @classmethod
    def of(cls, measure: Measure) -> AskedMeasure:
        return cls(
            task=measure if isinstance(measure, TaskAccuracy) else None,
            perplexity=measure if isinstance(measure, Perplexity) else None,
            generation=measure if isinstance(measure, RepetitionProbe) else None,
        )

    @property
    def measure(self) -> Measure:
        given: Measure | None = self.task or self.perplexity or self.generation
        assert given is not None
        return given


class IdentifyResult(TaskResult):
    """What figures belong to: the content of the model, and everything else that each measure's figures depend on."""

    fingerprint: str
    settings: tuple[dict[str, JsonValue], ...]


class IdentifyRequest(TaskRequest[IdentifyResult]):
    """Say that without loading the model."""

    kind: ClassVar[str] = "identify"
    measures: tuple[AskedMeasure, ...]


class JudgeResult(TaskResult):
    """What the measure found, and the model's ``parameters``."""

    result: Figures
    parameters: int
    seconds: float
    cpu_seconds: float


class JudgeRequest(TaskRequest[JudgeResult]):
    """Take one measure of the model."""

    kind: ClassVar[str] = "judge"
    measure: AskedMeasure
