"""The proposer that repeats an earlier job: its recorded calls, by sequence number, failures included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from selfpruner.errors import ConfigError
from selfpruner.proposers.base import OUTCOMES, VERDICTS, CallError, Reply, Request
from selfpruner.proposers.llm_calls import explain


class RecordedCall(BaseModel):
    """A row of ``llm_call``; what else it holds is ignored. Without ``sequence`` the order given counts."""

    operator: str
    reply: str
    sequence: int | None = None
    outcome: str = "ok"
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    detail: str | None = None


class ReplayProposer:
    """Answers call number n with recorded call number n. Costs nothing, whatever the recording cost."""

    def __init__(self, name: str, calls: Sequence[RecordedCall]) -> None:
        self.name = name
        self._calls = {number if call.sequence is None else call.sequence: call for number, call in enumerate(calls, 1)}
        self.model = next((call.model for call in calls if call.model), "replay")

    async def complete(self, request: Request) -> Reply:
        call = self._calls.get(request.sequence)
        if call is None:
            raise CallError(f"The recording ends before call {request.sequence}.", code="unreachable")
        if call.operator != request.operator:
            raise CallError(
                f"Recorded call {request.sequence} was made by {call.operator}, not {request.operator}: "
                "a recording fits the config and seed it was made with.",
                code="unreachable",
            )
        reply = Reply(call.reply, call.model or self.model, call.prompt_tokens, call.completion_tokens, 0.0)
        if call.outcome not in VERDICTS:
            raise CallError(call.detail or "as recorded", code=call.outcome, reply=reply)
        return reply


def read_recording(path: Path) -> list[RecordedCall]:
    """The calls of a JSONL file, one ``llm_call`` row a line. Raises ConfigError naming the first line that is not one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Cannot read the recording {path}: {error}. Export one from the llm_call table.", param="recording"
        ) from None
    calls = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            call = RecordedCall.model_validate_json(line)
        except ValidationError as error:
            raise ConfigError(
                f"{path}, line {number}: expected a JSON object with operator and reply ({explain(error)}).", param="recording"
            ) from None
        if call.outcome not in OUTCOMES:
            raise ConfigError(f"{path}, line {number}: unknown outcome {call.outcome!r}.", param="recording")
        calls.append(call)
    return calls
