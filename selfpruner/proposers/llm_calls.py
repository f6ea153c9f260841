"""The one way from LLM operators to a proposer: counted, capped, recorded, replayed.

Every call is an ``llm_call`` row, numbered from 1, failures included. Where a row exists already, it is replayed by its number
instead of calling, so a resumed job sees the replies it saw before. The caps of LlmLimits are checked before each call; only the
call in flight can exceed them. After three failed questions in a row the channel is closed for the generation.

A question may be in flight while workers score (``proposers.in_flight``). Questions wait for each other, so numbers and rows stay
in the order of asking. That order repeats on resume when one coroutine asks all the questions of a generation. A cancelled call
leaves no row and counts for nothing: the next run asks it again under the same number.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import JsonValue, ValidationError

import prompts
from selfpruner.config import LlmLimits
from selfpruner.errors import ConflictError, ProposerError
from selfpruner.proposers.base import REPAIRABLE, VERDICTS, CallError, Proposer, Reply, Request
from selfpruner.proposers.reply import NotJsonError, extract
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.records import LlmCall, Recorder
from selfpruner.stages import Stages

T = TypeVar("T")
Chat = tuple[Mapping[str, str], ...]

FAILURES_IN_A_ROW = 3
MAX_TEMPERATURE = 1.4
_DETAIL = 500  # characters of remarks on one reply


@dataclass(frozen=True, slots=True)
class _Question(Generic[T]):
    """What stays the same between a call and its repair turn."""

    operator: str
    generation: int
    schema: Mapping[str, JsonValue]
    validate: Callable[[dict[str, object]], T]
    heat: float


class LlmChannel:
    """What LLM operators ask. One per job; questions are put one after the other.

    ``refused`` counts what replies held and did not become a plan, by reason: ``known``, ``near`` (hardly different from a known
    plan) and ``unfit``; the rows' ``detail`` says the same reply by reply.
    """

    def __init__(
        self,
        proposer: Proposer,
        recorder: Recorder,
        limits: LlmLimits,
        settings: ProposerSettings,
        seed: int,
        stages: Stages | None = None,
    ) -> None:
        self.settings = settings
        self.calls = 0
        self.tokens = 0
        self.cost = 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self.refused: Counter[str] = Counter()
        self._proposer = proposer
        self._recorder = recorder
        self._limits = limits
        self._seed = seed
        self._stages = stages or Stages()
        self._generation = 0
        self._failures = 0
        self._remarks: list[str] = []
        self._turn = asyncio.Lock()

    @property
    def overlaps(self) -> bool:
        """Whether a call leaves the workers free to score meanwhile. The local model is asked on a worker: there a call started
        first only waits, and its time is up before its turn."""
        return self.settings.kind != "local"

    @property
    def open(self) -> bool:
        """Whether a question may be put now."""
        return self._failures < FAILURES_IN_A_ROW and not self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether a cap was reached; that lasts for the rest of the job."""
        priced = self.settings.price_prompt > 0 or self.settings.price_completion > 0
        limits = self._limits
        return self.calls >= limits.calls or self.tokens >= limits.tokens or (priced and self.cost >= limits.cost)

    def new_generation(self, generation: int) -> None:
        """A proposer that was left out gets its next chance; the generation under way already changes nothing."""
        if generation != self._generation:
            self._generation = generation
            self._failures = 0

    def remark(self, reason: str, text: str) -> None:
        """For ``validate``: something in the reply was left out, for ``reason``; ``text`` goes into the row's detail."""
        self.refused[reason] += 1
        self._remarks.append(text)

    async def ask(
        self,
        operator: str,
        generation: int,
        variables: Mapping[str, object],
        schema: Mapping[str, JsonValue],
        validate: Callable[[dict[str, object]], T],
        *,
        heat: float = 0.0,
        vital: bool = True,
    ) -> T:
        """Put one question, with one repair turn, and return what ``validate`` made of the answer.

        ``variables`` fill the template named ``operator``; ``heat`` is added to the temperature, up to MAX_TEMPERATURE.
        ``validate`` raises ValueError (pydantic's included) when the answer does not fit, CallError to give it another outcome.
        A bad answer to a question that is not ``vital`` does not count towards the failures that close the channel.

        Raises ProposerError when nothing usable came back or the channel is closed; ConflictError when the recorded calls of
        this job were made by another config.
        """
        async with self._turn:
            self.new_generation(generation)
            if not self.open:
                self._tell_exhausted()
                raise ProposerError("The proposer is left out: a cap was reached, or it failed too often in this generation.")
            chat: Chat = prompts.messages(operator, variables, self.settings.prompt_chars)
            question = _Question(operator, generation, schema, validate, heat)
            try:
                try:
                    answer = await self._call(question, chat, "ok")
                except CallError as error:
                    if error.code not in REPAIRABLE or error.reply is None or self.exhausted:
                        raise
                    second = prompts.repair(chat, error.reply.text, error.message)
                    answer = await self._call(question, second, "repaired")
            except CallError as error:
                if vital or error.code not in VERDICTS:
                    self._failed(generation, error)
                raise
            finally:
                self._tell_exhausted()
            if vital:
                self._failures = 0
            return answer

    async def _call(self, question: _Question[T], chat: Chat, accepted: str) -> T:
        """One numbered call: replayed or made, judged, recorded, counted. Nothing is kept before the reply is here."""
        sequence = self.calls + 1
        settings = self.settings
        seed = int(hashlib.sha256(f"{self._seed}:{sequence}".encode()).hexdigest()[:7], 16)
        temperature = max(settings.temperature, min(settings.temperature + question.heat, MAX_TEMPERATURE))
        request = Request(question.operator, chat, question.schema, temperature, settings.max_tokens, seed, sequence)
        recorded = self._recorder.find_llm_call(sequence)
        if recorded is not None and (recorded.operator, recorded.generation) != (question.operator, question.generation):
            raise ConflictError(
                f"Recorded LLM call {sequence} belongs to {recorded.operator} in generation {recorded.generation}, but the search "
                f"is at {question.operator} in generation {question.generation}: its config or version changed. Start a new job.",
                code="replay_mismatch",
            )
        try:
            reply = await self._proposer.complete(request) if recorded is None else _replayed(recorded)
            self._remarks.clear()
            answer = judge(reply, question.validate)
        except CallError as error:
            reply = error.reply or Reply("", self._proposer.model, 0, 0, 0.0)
            self._book(question, request, reply, error.code, error.message, new=recorded is None)
            raise
        self._book(question, request, reply, accepted, "; ".join(self._remarks)[:_DETAIL], new=recorded is None)
        return answer

    def take_seconds(self) -> dict[str, float]:
        """Seconds of answering per operator since the last time this was asked, replayed calls included."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    def _book(self, question: _Question[T], request: Request, reply: Reply, outcome: str, detail: str, *, new: bool) -> None:
        """Count the call, and record it if it is new."""
        self.calls = request.sequence
        self.tokens += reply.prompt_tokens + reply.completion_tokens
        self.cost += reply.cost
        self._seconds[request.operator] += reply.seconds
        if new:
            self._stages.count(reply.prompt_tokens + reply.completion_tokens, "thinking")
            self._recorder.save_llm_call(
                LlmCall(
                    sequence=request.sequence,
                    generation=question.generation,
                    operator=request.operator,
                    proposer=self._proposer.name,
                    model=reply.model,
                    messages=request.messages,
                    reply=reply.text,
                    outcome=outcome,
                    prompt_tokens=reply.prompt_tokens,
                    completion_tokens=reply.completion_tokens,
                    seconds=reply.seconds,
                    cost=reply.cost,
                    detail=detail,
                )
            )

    def _failed(self, generation: int, error: CallError) -> None:
        self._failures += 1
        if self._failures == FAILURES_IN_A_ROW:
            self._recorder.event(
                f"llm-left-out-{generation}",
                "llm.left_out",
                f"The proposer failed {FAILURES_IN_A_ROW} times in a row; generation {generation} goes on without it. "
                f"Last: {error.code}: {error.message}",
                level="warn",
                data={"generation": generation, "outcome": error.code},
            )

    def _tell_exhausted(self) -> None:
        if self.exhausted:
            self._recorder.event(
                "llm-limit",
                "llm.limit_reached",
                f"The cap on LLM use was reached after {self.calls} calls, {self.tokens:,} tokens and a cost of {self.cost:.4f}; "
                "the search goes on without the LLM.",
                level="warn",
                data={"calls": self.calls, "tokens": self.tokens, "cost": self.cost},
            )


def judge(reply: Reply, validate: Callable[[dict[str, object]], T]) -> T:
    """What ``validate`` makes of the reply. Raises CallError ``not_json``, ``invalid``, or what ``validate`` chose."""
    try:
        return validate(extract(reply.text))
    except CallError as error:
        raise CallError(error.message, code=error.code, reply=reply) from None
    except NotJsonError as error:
        raise CallError(f"{error}", code="not_json", reply=reply) from None
    except ValidationError as error:
        raise CallError(explain(error), code="invalid", reply=reply) from None
    except ValueError as error:
        raise CallError(str(error), code="invalid", reply=reply) from None


def explain(error: ValidationError) -> str:
    """The first complaints of pydantic, without the values it complains about."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [f"{'.'.join(map(str, detail['loc'])) or 'answer'}: {detail['msg']}" for detail in details[:3]]
    more = [f"and {len(details) - 3} more"] if len(details) > 3 else []
    return "; ".join([*lines, *more])


def _replayed(call: LlmCall) -> Reply:
    reply = Reply(call.reply, call.model, call.prompt_tokens, call.completion_tokens, call.seconds, call.cost)
    if call.outcome not in VERDICTS:
        raise CallError(call.detail, code=call.outcome, reply=reply)
    return reply
