"""A search without torch: an analytic pool, a recorder in memory, a proposer that follows the schema it is given."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from selfpruner.config import LlmLimits, SearchConfig
from selfpruner.errors import ConfigError, OutOfMemoryError
from selfpruner.evolution.evaluator import FIRST, SLOPE_PASSES, Evaluator
from selfpruner.evolution.loop import Search
from selfpruner.evolution.outcome import Outcome
from selfpruner.evolution.windows import Windows
from selfpruner.planning.space import Block, Plan, SearchSpace
from selfpruner.progress import OnProgress
from selfpruner.proposers import ProposerSettings
from selfpruner.proposers.base import CallError, Reply, Request
from selfpruner.proposers.llm_calls import LlmChannel
from selfpruner.records import Candidate, Evaluation, LlmCall, Progress, Severity, Window
from selfpruner.stages import Stage
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import (
    EvaluateRequest,
    EvaluateResult,
    GenerateRequest,
    GenerateResult,
    ModelFacts,
    PrepareResult,
    RaceTerms,
    ScoreRow,
    SlopesRequest,
    SlopesResult,
    TaskRequest,
    TextFacts,
    TimeBlocksRequest,
    TimeBlocksResult,
)

SESSION = Session("key", {}, "")


class DiedError(BaseException):
    """The process died here: no handler of errors sees it."""


class Interruptions:
    """Dies at await point number ``at``, counted over everything that asks."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.points = 0

    def point(self) -> None:
        self.points += 1
        if self.points == self.at:
            raise DiedError


class MemoryRecorder:
    """What the store keeps, under the store's rules."""

    def __init__(self) -> None:
        self.evaluations: dict[tuple[str, str], Evaluation] = {}
        self.calls: dict[int, LlmCall] = {}
        self.candidates: dict[str, Candidate] = {}
        self.events: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
        self.reports: list[Progress] = []
        self.stages: dict[str, Stage] = {}

    def find_evaluation(self, plan_hash: str, window: str) -> Evaluation | None:
        return self.evaluations.get((plan_hash, window))

    def save_evaluations(self, rows: Sequence[Evaluation]) -> None:
        for row in rows:
            assert row.kl is None or math.isfinite(row.kl)
            self.evaluations.setdefault((row.plan_hash, row.window), row)

    def find_llm_call(self, sequence: int) -> LlmCall | None:
        return self.calls.get(sequence)

    def save_llm_call(self, call: LlmCall) -> None:
        assert call.sequence not in self.calls, "a recorded call is replayed, not written again"
        self.calls[call.sequence] = call

    def save_candidates(self, rows: Sequence[Candidate]) -> None:
        for row in rows:
            known = self.candidates.get(row.plan_hash)
            if known is None:
                self.candidates[row.plan_hash] = copy.copy(row)
            elif row.status != "pending":
                origin = {"parents": known.parents, "operator": known.operator, "generation": known.generation}
                fresh = copy.copy(row)
                for name, value in origin.items():
                    setattr(fresh, name, value)
                self.candidates[row.plan_hash] = fresh

    def event(self, key: str, type: str, message: str, *, level: Severity = "info", data: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        self.events.setdefault(key, (type, message, dict(data or {})))

    def find_event(self, key: str) -> Mapping[str, Any] | None:
        return self.events[key][2] if key in self.events else None

    def progress(self, progress: Progress) -> None:
        self.reports.append(progress)

    def find_stages(self) -> list[Stage]:
        return list(self.stages.values())

    def save_stages(self, stages: Sequence[Stage]) -> None:
        self.stages |= {stage.name: stage for stage in stages}


class AnalyticPool:
    """KL is a known convex function of the levels, times a factor that all plans share on the same tokens.

    ``memory``: more plans than that in one task do not fit. ``broken``: hashes of plans that score NaN. ``seen`` counts every
    (plan, tokens) pair that was really scored, ``tokens`` the plan-tokens by text. In a race the contenders beyond those to be kept
    are dropped after a quarter of the tokens. ``repetition``: rates by plan hash and ``dense`` (0.3 where not named) or the error
    that writing raises; ``wrote``: the names of every such task.
    """

    workers = 1

    def __init__(self, space: SearchSpace, interruptions: Interruptions | None = None) -> None:
        self.space = space
        self.interruptions = interruptions or Interruptions()
        self.memory = 10**9
        self.foresees = True
        self.broken: set[str] = set()
        self.too_large: set[str] = set()
        self.seen: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.tasks: list[int] = []
        self.repetition: dict[str, float] | Exception = {}
        self.wrote: list[list[str]] = []
        self.slow_attention = 3.0
        rng = random.Random(5)
        self.weights = [rng.uniform(0.2, 3.0) for _ in space.blocks]

    def kl(self, plan: Plan) -> float:
        pairs = zip(self.weights, self.space.block_rates(plan), strict=True)
        return sum(weight * (rate + 4 * rate**3) for weight, rate in pairs) / len(self.weights)

    async def run(self, session: Session, request: TaskRequest[Any], on_progress: OnProgress | None = None) -> Any:  # noqa: ARG002
        self.interruptions.point()
        match type(request).read(request.to_json()):
            case GenerateRequest() as asked:
                return self._generate(asked)
            case TimeBlocksRequest() as asked:
                blocks = tuple(self._times(block) for block in self.space.blocks)
                return TimeBlocksResult(tokens=asked.tokens, blocks=blocks, rest=40.0)
            case SlopesRequest() as asked:
                return self._slopes(asked)
            case EvaluateRequest() as asked:
                return self._evaluate(asked)
        raise AssertionError(request.kind)

    def _evaluate(self, request: EvaluateRequest) -> EvaluateResult:
        plans = [Plan(levels) for levels in request.plans]
        self.tasks.append(len(plans))
        if len(plans) > self.memory or self.too_large & {plan.hash for plan in plans}:
            raise OutOfMemoryError("no room")
        sequences = request.sequences
        race = request.race or RaceTerms(keep=0, contenders=())
        dropped = sorted(race.contenders, key=lambda index: self.kl(plans[index]))[race.keep :]
        rows = []
        for index, plan in enumerate(plans):
            self.space.check(plan)
            self.seen[plan.hash, request.text, sequences] += 1
            noise = 1 + 0.2 * random.Random(str(sequences)).random()
            kl = self.kl(plan) * noise
            row = ScoreRow(kl=kl, nll=3 + kl, tokens=16 * len(sequences))
            if plan.hash in self.broken:
                row = ScoreRow(kl=None, nll=None, tokens=row.tokens, reason="fitness is not finite (kl nan, nll nan)")
            elif index in dropped:
                row = ScoreRow(kl=1.01 * kl, nll=3 + 1.01 * kl, tokens=4 * len(sequences), rejected=True)
            self.tokens[request.text] += row.tokens
            rows.append(row)
        return EvaluateResult(
            rows=tuple(rows),
            seconds=0.01 * len(plans),
            passes=0,
            passes_without_sharing=0,
            peak_mib=100.0 + len(self.tasks),
        )

    def _times(self, block: Block) -> tuple[float, ...]:
        """Microseconds: the time of attention falls faster with its rate than an FFN's, and a part of a block's never falls."""
        slow = self.slow_attention if block.kind == "attention" else 1.0
        return tuple(20 + 80 * slow * (1 - block.rate(level)) for level in range(len(block.options)))

    def _generate(self, request: GenerateRequest) -> GenerateResult:
        assert (request.text, request.prompt, request.new_tokens) == ("fitness", 32, 48)
        assert 1 <= len(request.sequences) <= 8
        self.wrote.append(list(request.plans))
        if isinstance(self.repetition, Exception):
            raise self.repetition
        assert not any(request.plans["dense"])
        rates = self.repetition
        return GenerateResult(repetition={name: rates.get(name, 0.3) for name in request.plans}, seconds=0.01)

    def _slopes(self, request: SlopesRequest) -> SlopesResult:
        """Exact: what a move changes is what the first term says."""
        if not self.foresees:
            raise ConfigError("slopes need the model in memory")
        here = Plan(request.plan)
        kl, sequences = self.kl(here), request.sequences
        self.seen[here.hash, "slopes", sequences] += 1
        moved = [Plan((*here.levels[:block], level, *here.levels[block + 1 :])) for block, level in request.moves]
        first = tuple((self.kl(plan) - kl) / FIRST for plan in moved)
        tokens = 16 * len(sequences)
        self.tokens[request.text] += tokens * (SLOPE_PASSES + len(moved) // len(here.levels))
        size, energy = (0.0,) * len(first), (1.0,) * len(first)
        return SlopesResult(kl=kl, first=first, size=size, energy=energy, tokens=tokens, seconds=0.01, peak_mib=100.0)

    async def close(self) -> None:
        """Nothing to close."""


class ScriptedProposer:
    """Answers any schema with numbers drawn from the call's own seed. ``failures`` maps call numbers to outcomes."""

    name = "scripted"
    model = "scripted-1"

    def __init__(self, interruptions: Interruptions | None = None, failures: Mapping[int, str] | None = None) -> None:
        self.interruptions = interruptions or Interruptions()
        self.failures = dict(failures or {})
        self.made: list[int] = []

    async def complete(self, request: Request) -> Reply:
        self.interruptions.point()
        self.made.append(request.sequence)
        failure = self.failures.get(request.sequence)
        if failure == "not_json":
            return Reply("I would rather not.", self.model, 100, 10, 0.1)
        if failure is not None:
            raise CallError("as scripted", code=failure)
        rng = random.Random(request.seed)
        return Reply(json.dumps(_answer(request.schema, rng)), self.model, 100, 50, 0.5)


def _answer(schema: Mapping[str, Any], rng: random.Random) -> Any:
    if schema["type"] == "object":
        return {name: _answer(part, rng) for name, part in schema["properties"].items()}
    if schema["type"] == "array":
        values = [_answer(schema["items"], rng) for _ in range(schema["minItems"])]
        if schema["items"]["type"] == "integer" and schema["minItems"] == 2 and values[0] == values[1]:
            values[1] = schema["items"]["minimum"] + (values[0] == schema["items"]["minimum"])
        return values
    if schema["type"] == "string":
        return rng.choice(schema.get("enum", [f"Keep more of ffn {rng.randint(1, 9)}, it is sensitive."]))
    assert schema["type"] == "integer"
    return rng.randint(schema["minimum"], min(schema["maximum"], 45))


def config_of(preset: str = "evolution", **changes: Any) -> SearchConfig:
    """A small search: three stages of the paper's game in a second."""
    small: dict[str, Any] = {
        "rate": 0.2,
        "preset": preset,
        "population": 4,
        "crossover_offspring": 4,
        "mutation_offspring": 4,
        "generations": 3,
        "stages": [{"tokens": 32, "keep": 5}, {"tokens": 96, "keep": 3}],
        "probe_tokens": 32,
        "survey_tokens": 32,
        "final_tokens": 128,
        "seed": 3,
    }
    if preset == "self-pruner":
        small["stages"] = [{"tokens": 64, "keep": 8}]
    return SearchConfig.model_validate({**small, **changes})


class Run:
    """One search over ``recorder``; several may share it, one after the other."""

    def __init__(
        self,
        config: SearchConfig,
        space: SearchSpace,
        recorder: MemoryRecorder,
        *,
        pool: AnalyticPool | None = None,
        proposer: ScriptedProposer | None = None,
        limits: LlmLimits | None = None,
    ) -> None:
        self.recorder = recorder
        self.pool = pool or AnalyticPool(space)
        self.evaluator = Evaluator(self.pool, SESSION, recorder)
        self.windows = Windows(
            60,
            16,
            seed=config.seed,
            probe=config.probe_tokens,
            final=config.final_tokens,
            stages=[stage.tokens for stage in config.stages],
            survey=config.survey_tokens,
        )
        self.proposer = proposer or ScriptedProposer()
        channel = None
        if "llm" in config.needs:
            settings = ProposerSettings(kind="openai", model="scripted-1")
            channel = LlmChannel(self.proposer, recorder, limits or config.limits, settings, config.seed)
        self.search = Search(config, space, self.evaluator, recorder, self.windows, channel)

    async def go(self) -> Outcome:
        return await self.search.run()


def prepared_of(space: SearchSpace, **signals: Any) -> PrepareResult:
    """What a worker says that made ``space`` ready."""
    sizes = {"layers": space.layers, "hidden": 32, "heads": 4, "kv_groups": 2, "head_dim": 8, "channels": 96}
    counts = {"parameters": space.total, "decoder_parameters": space.total}
    text = TextFacts(sources=(), sequences=8, length=64, fingerprint="same")
    return PrepareResult(
        space=space,
        signals=signals,
        model=ModelFacts(name="tiny", fingerprint="same", family="llama", **sizes, **counts),
        texts={"fitness": text, "report": text},
        dtype="float32",
        device="cpu",
        streamed=False,
        seconds=0.0,
    )


def window(name: str = "w", *sequences: int) -> Window:
    return Window(name, "fitness", sequences or (0, 1))
