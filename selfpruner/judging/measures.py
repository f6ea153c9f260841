"""What ``selfpruner evaluate`` measures: zero-shot tasks, perplexity of the field's texts, and how a model writes.

A measure has a ``name`` for tables, a ``setting`` (everything except the model that its figures depend on, known before a model is
loaded), and ``run``. Outcomes are kept per document, window or prompt, so that two models can be compared in pairs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, Protocol, final

from pydantic import JsonValue
from typing_extensions import TypedDict

from selfpruner import models
from selfpruner.errors import ConfigError, OutOfMemoryError
from selfpruner.judging.estimates import mean
from selfpruner.judging.loading import load, share
from selfpruner.judging.task_files import LocalTask
from selfpruner.models import checks, saved

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from selfpruner.judging.corpora import Corpus

Tell = Callable[[str], None]

INSTALL = "pip install 'lm_eval>=0.4.13'"
NEW_TOKENS = 64
_VERSION = 1  # of how outcomes are computed: another one is another setting


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """A model under evaluation, in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cache: Path
    streamed: bool = False

    def refuse_streamed(self, what: str) -> None:
        """Raise OutOfMemoryError for what reads a model once per word, where that means reading all its files."""
        if self.streamed:
            raise OutOfMemoryError(
                f"The model does not fit the memory there is whole, and {what} are not streamed. Give more memory, use another "
                "device, or measure perplexity only.",
                param="memory",
            )

    @property
    def context(self) -> int:
        config = self.model.config.get_text_config()
        return int(config.max_position_embeddings)


@dataclass(frozen=True)
class ModelPlace:
    """Where a model is and what it is called: a checkpoint of selfpruner, or a model by name, folder or hub id. ``memory`` and
    ``tokens`` as in :class:`selfpruner.judging.tasks.Judged`."""

    name: str
    cache: Path
    device: torch.device
    dtype: str
    memory: int | None = None
    tokens: int = NEW_TOKENS

    @property
    def own(self) -> bool:
        return saved.is_pruned(Path(self.name))

    @cached_property
    def source(self) -> models.ModelSource:
        return models.resolve(self.name, self.cache)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the content, wherever it lies."""
        return (saved.fingerprint(Path(self.name)) if self.own else self.source.fingerprint)[:16]

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """``auto`` is float32 on a CPU, where bfloat16 moves log-likelihoods by tenths of a nat from batch to batch; elsewhere the
        checkpoint's own half type."""
        import torch

        if self.dtype == "auto" and self.device.type == "cpu":
            return torch.float32
        stored = checks.stored_dtype(Path(self.name) if self.own else self.source.folder)
        return models.choose_dtype(self.dtype, self.device, stored=stored)

    def load(self) -> MeasuredModel:
        """Raises the errors of loading. A model that does not fit is streamed."""
        room = share(self.memory, [self.name], self.cache, self.tokens)
        loaded = load(self.name, self.cache, self.device, str(self.torch_dtype).removeprefix("torch."), room)
        return MeasuredModel(loaded.model, loaded.tokenizer, self.cache, loaded.streamed)


class PairedOutcomes(TypedDict, total=False):
    """What a measure found one by one, so that two models are compared in pairs. ``acc`` and ``acc_norm``: a digit per document;
    ``nll``: a number per window; ``repetition`` and ``text``: one per prompt."""

    acc: str
    acc_norm: str
    nll: list[float]
    repetition: list[float]
    text: list[str]


@final
class TaskFigures(TypedDict):
    """Shares of ``documents`` answered right; ``of`` are in the task."""

    documents: int
    of: int
    acc: float
    acc_stderr: float | None
    acc_norm: NotRequired[float]
    acc_norm_stderr: NotRequired[float | None]
    outcomes: PairedOutcomes


@final
class PerplexityFigures(TypedDict):
    """``nll`` in nats per token."""

    windows: int
    tokens: int
    nll: float
    nll_stderr: float | None
    perplexity: float
    perplexity_stderr: float | None
    outcomes: PairedOutcomes


@final
class RepetitionFigures(TypedDict):
    """Shares in [0, 1]: of text that repeats itself, and of distinct words, pairs and triples."""

    prompts: int
    repetition: float
    repetition_stderr: float | None
    distinct_1: float
    distinct_2: float
    distinct_3: float
    outcomes: PairedOutcomes


Figures = TaskFigures | PerplexityFigures | RepetitionFigures


class Measure(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def setting(self) -> dict[str, JsonValue]: ...

    def run(self, subject: MeasuredModel, tell: Tell) -> Figures:
        """The figures with their standard errors, and what they are made of."""


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on a zero-shot multiple-choice task; ``limit`` documents of it, None for all."""

    name: str
    limit: int | None
    data: Path | None

    @cached_property
    def _local(self) -> LocalTask | None:
        return LocalTask.find(self.name, self.data)

    @cached_property
    def setting(self) -> dict[str, JsonValue]:
        source = "hub" if self._local is None else f"local:{self._local.digest}"
        return {"task": self.name, "source": source, "limit": self.limit, "lm_eval": harness_version(), "version": _VERSION}

    def run(self, subject: MeasuredModel, tell: Tell) -> TaskFigures:
        from selfpruner.judging import harness

        def progress(done: int, total: int) -> None:
            tell(f"{self.name}: {done:,}/{total:,} tokens")

        subject.refuse_streamed("tasks")
        tell(f"{self.name}: reading")
        task = harness.load_task(self.name, self._local, subject.cache)
        outcome = harness.run(
            task, self.name, harness.SharedContextLM(subject.model, subject.tokenizer, progress=progress), self.limit
        )
        found = {metric: mean(values) for metric, values in outcome.metrics.items()}
        # A digit per document: a thousand of them are one line.
        digits = {metric: "".join(map(str, values)) for metric, values in outcome.metrics.items()}
        result: TaskFigures = {
            "documents": len(outcome.metrics["acc"]),
            "of": outcome.total,
            "acc": round(found["acc"].value, 6),
            "acc_stderr": _rounded(found["acc"].stderr, 6),
            "outcomes": {"acc": digits["acc"]},
        }
        if "acc_norm" in found:
            result["acc_norm"] = round(found["acc_norm"].value, 6)
            result["acc_norm_stderr"] = _rounded(found["acc_norm"].stderr, 6)
            result["outcomes"]["acc_norm"] = digits["acc_norm"]
        return result


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of ``text`` in windows of ``seqlen`` tokens; ``windows`` of them, None for all."""

    text: str
    seqlen: int
    windows: int | None
    data: Path | None

    @property
    def name(self) -> str:
        return f"{self.text}@{self.seqlen}"

    @cached_property
    def _corpus(self) -> Corpus:
        from selfpruner.judging.corpora import corpus

        return corpus(self.text, self.data)

    @cached_property
    def setting(self) -> dict[str, JsonValue]:
        corpus = self._corpus
        return {
            "text": self.text,
            "seqlen": self.seqlen,
            "windows": self.windows,
            "source": corpus.source,
            "digest": corpus.digest,
            "version": _VERSION,
        }

    def run(self, subject: MeasuredModel, tell: Tell) -> PerplexityFigures:
        from selfpruner.calibration.soundness import not_numbers
        from selfpruner.judging import corpora, perplexity

        if self.seqlen > subject.context:
            raise ConfigError(
                f"Windows of {self.seqlen:,} tokens are longer than the model's context of {subject.context:,}.", param="seqlen"
            )
        tokens = corpora.windows(self._corpus, subject.tokenizer, self.seqlen, self.windows)
        models.check_ids([int(tokens.max())], subject.model, subject.tokenizer, f"The text {self._corpus.name}")
        losses = perplexity.losses(subject.model, tokens, progress=lambda text: tell(f"{self.name}: {text}"))
        if any(map(math.isnan, losses)):
            raise not_numbers(subject.model)
        nll = mean(losses)
        value = math.exp(min(nll.value, 700.0))
        return {
            "windows": len(losses),
            "tokens": len(losses) * (self.seqlen - 1),
            "nll": round(nll.value, 6),
            "nll_stderr": _rounded(nll.stderr, 6),
            "perplexity": round(value, 4),
            # The delta method: the derivative of exp is itself.
            "perplexity_stderr": None if nll.stderr is None else round(value * nll.stderr, 4),
            "outcomes": {"nll": [round(loss, 5) for loss in losses]},
        }


@dataclass(frozen=True)
class RepetitionProbe:
    """How a model goes on, greedily, from fixed prompts."""

    new_tokens: int = NEW_TOKENS

    @property
    def name(self) -> str:
        return "generation"

    @cached_property
    def setting(self) -> dict[str, JsonValue]:
        from selfpruner.judging.repetition import PROMPTS

        digest = hashlib.sha256(json.dumps(PROMPTS).encode()).hexdigest()[:16]
        return {"generation": digest, "new_tokens": self.new_tokens, "version": _VERSION}

    def run(self, subject: MeasuredModel, tell: Tell) -> RepetitionFigures:
        from selfpruner.judging import repetition

        subject.refuse_streamed("writing probes")
        tell(f"writing after {len(repetition.PROMPTS)} prompts")
        written = repetition.after_prompts(subject.model, subject.tokenizer, repetition.PROMPTS, self.new_tokens)
        rates = [repetition.repeated(tokens) for tokens in written]
        value = mean(rates)
        return {
            "prompts": len(written),
            "repetition": round(value.value, 6),
            "repetition_stderr": _rounded(value.stderr, 6),
            "distinct_1": round(repetition.distinct(written, 1), 6),
            "distinct_2": round(repetition.distinct(written, 2), 6),
            "distinct_3": round(repetition.distinct(written, 3), 6),
            "outcomes": {"repetition": [round(rate, 5) for rate in rates], "text": subject.tokenizer.batch_decode(written)},
        }


def harness_version() -> str:
    """The installed version of lm-evaluation-harness. Raises ConfigError with the command that installs it."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"Zero-shot tasks need lm-evaluation-harness, which is not installed. Run: {INSTALL}",
            code="not_installed",
            param="tasks",
        ) from None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
