"""The proposer that repeats an earlier job: its recorded calls, by sequence number, failures included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from selfpruner.errors import ConfigError
from selfpruner.json_objects import JsonMapping
from selfpruner.proposers.base import OUTCOMES, VERDICTS, CallError, Reply, Request


class ReplayProposer:
    """Answers call number n with recorded call number n. Costs nothing, whatever the recording cost."""

    def __init__(self, name: str, calls: Sequence[JsonMapping]) -> None:
        """``calls`` are rows of ``llm_call``: ``operator`` and ``reply``, with ``sequence`` (else the order given), ``outcome``
        ("ok"), ``model``, ``prompt_tokens``, ``completion_tokens`` and ``detail``."""
        self.name = name
        self._calls = {int(call.get("sequence", number)): call for number, call in enumerate(calls, 1)}
        self.model = next((str(call["model"]) for call in calls if call.get("model")), "replay")

    async def complete(self, request: Request) -> Reply:
        call = self._calls.get(request.sequence)
        if call is None:
            raise CallError(f"The recording ends before call {request.sequence}.", code="unreachable")
        if call["operator"] != request.operator:
            raise CallError(
                f"Recorded call {request.sequence} was made by {call['operator']}, not {request.operator}: "
                "a recording fits the config and seed it was made with.",
                code="unreachable",
            )
        reply = Reply(
            str(call["reply"]),
            str(call.get("model") or self.model),
            int(call.get("prompt_tokens", 0)),
            int(call.get("completion_tokens", 0)),
            0.0,
        )
        outcome = str(call.get("outcome", "ok"))
        if outcome not in VERDICTS:
            raise CallError(str(call.get("detail") or "as recorded"), code=outcome, reply=reply)
        return reply


def read_recording(path: Path) -> list[dict[str, object]]:
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
            call = json.loads(line)
        except ValueError:
            call = None
        if not (isinstance(call, dict) and isinstance(call.get("operator"), str) and isinstance(call.get("reply"), str)):
            raise ConfigError(f"{path}, line {number}: expected a JSON object with operator and reply.", param="recording")
        if call.get("outcome", "ok") not in OUTCOMES:
            raise ConfigError(f"{path}, line {number}: unknown outcome {call['outcome']!r}.", param="recording")
        calls.append(call)
    return calls
