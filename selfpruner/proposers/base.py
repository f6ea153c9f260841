"""The contract of a proposer: something that answers an LLM operator's messages with text. Imports no SDK and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pydantic import JsonValue

from selfpruner.errors import ProposerError

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
# What a repair turn may mend, and what is a verdict on a text, which a replay reaches again. The other outcomes come from the
# transport, and a replay repeats them as they are.
REPAIRABLE = ("not_json", "invalid")
VERDICTS = (*REPAIRABLE, "ok", "repaired", "no_new_plan")


@dataclass(frozen=True, slots=True)
class Request:
    """One chat call. ``schema`` is a JSON schema (object at the top, no additional properties) the reply must satisfy.

    ``sequence`` numbers the calls of a job from 1.
    """

    operator: str
    messages: tuple[Mapping[str, str], ...]
    schema: Mapping[str, JsonValue]
    temperature: float
    max_tokens: int
    seed: int
    sequence: int = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """``cost`` is in the currency of the settings' prices; 0 for a local model."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost: float = 0.0


class CallError(ProposerError):
    """A call that gave nothing usable. ``code`` is an outcome above; ``reply`` is what was received and what it cost."""

    def __init__(self, message: str, *, code: str, reply: Reply | None = None) -> None:
        super().__init__(message, code=code)
        self.reply = reply


class Proposer(Protocol):
    """Raises :class:`CallError`; never anything else, apart from asyncio's cancellation."""

    name: str
    model: str

    async def complete(self, request: Request) -> Reply: ...
