"""What the process that holds a timed model is asked and answers; see :mod:`selfpruner.workers.tasks`. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import JsonValue

from selfpruner.errors import OutOfMemoryError
from selfpruner.files.places import mib
from selfpruner.timing.model_cost import ModelCost
from selfpruner.workers.tasks import Contract, TaskRequest, TaskResult


class TransformersConfig(Contract):
    """A session of transformers: ``model`` is a name, a folder, a checkpoint of selfpruner, or the fields of a config
    (``{"model_type": ...}``), whose model gets random weights."""

    model: str | dict[str, JsonValue]
    dtype: str
    compiled: bool = False


class GgufConfig(Contract):
    """A session of llama.cpp: a file, how many ``sequences`` there is room for, and of how many tokens (``context``)."""

    model: str
    sequences: int
    context: int


def refuse_larger(name: object, weights: int, memory: int | None) -> None:
    """Raise OutOfMemoryError for a model that does not fit beside those that are there already."""
    if memory is not None and weights > memory:
        raise OutOfMemoryError(
            f"{name} takes {mib(weights)}, and {mib(max(memory, 0))} of memory are left for it. Give more, or "
            "time fewer models at once; a model that is streamed from its files has no speed to compare.",
            param="memory",
        )


class LoadResult(TaskResult):
    """``limit``: positions the model has. ``threads`` are those it computes with, ``base_mib`` the process's peak before it was
    loaded; None where it runs elsewhere."""

    work: ModelCost
    limit: int
    device: str
    dtype: str
    threads: int | None
    base_mib: float | None


class LoadRequest(TaskRequest[LoadResult]):
    """Load the session's model, and say what it is. One that takes more than ``memory`` bytes is refused."""

    kind: ClassVar[str] = "load"
    memory: int | None = None


class PrefillResult(TaskResult):
    """``seconds`` until the logits of the last position were there, ``first_token`` until the token after it was known here."""

    seconds: float
    first_token: float


class PrefillRequest(TaskRequest[PrefillResult]):
    """Read one prompt of ``tokens`` tokens."""

    kind: ClassVar[str] = "prefill"
    tokens: int


class DecodeResult(TaskResult):
    """``tokens`` written by all sequences together, and in how long."""

    tokens: int
    seconds: float


class DecodeRequest(TaskRequest[DecodeResult]):
    """Write ``new_tokens`` after a prompt of ``prompt`` tokens, ``batch`` sequences at once; reading it is not timed."""

    kind: ClassVar[str] = "decode"
    batch: int
    prompt: int
    new_tokens: int


class MemoryResult(TaskResult):
    """Peak memory in MiB, ``of`` the ``process`` or of the model and its work on the ``device``; None where it runs elsewhere."""

    mib: float | None
    of: str | None


class MemoryRequest(TaskRequest[MemoryResult]):
    """How much memory it took so far."""

    kind: ClassVar[str] = "memory"
