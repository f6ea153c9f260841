"""The contract of a proposer: something that answers an LLM operator's messages with text. Imports no SDK and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

# Typed outcomes of a call, as stored in llm_call.outcome. The first two gave plans.
OUTCOMES: Mapping[str, str] = {
    "ok": "valid at once",
    "repaired": "valid after the repair turn",
    "timeout": "no answer in time",
    "unreachable": "connection refused, reset or cut",
    "rate_limited": "429 after the client's own retries",
    "server_error": "5xx after the client's own retries",
    "rejected": "another 4xx: key, model name or request refused",
    "refused": "the model declined",
    "empty": "no text",
    "truncated": "the reply hit the token limit",
    "too_large": "more text than a reply can need",
    "not_json": "prose, or JSON that does not parse",
    "invalid": "JSON that does not fit the schema: wrong length, out of range, NaN",
    "no_new_plan": "valid, but every plan was known already",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One chat call. ``schema`` is a JSON schema (object at the top, no additional properties) the reply must satisfy."""

    operator: str
    messages: tuple[Mapping[str, str], ...]
    schema: Mapping[str, Any]
    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """``cost`` is in the currency of the settings' prices; 0 for a local model."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost: float = 0.0


class Proposer(Protocol):
    """Raises :class:`selfpruner.errors.ProposerError` whose ``code`` is an outcome above; never anything else."""

    name: str
    model: str

    async def complete(self, request: Request) -> Reply: ...
