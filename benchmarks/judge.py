"""One model under judgement: every method gets the same session, the same text and the same number of fitness tokens.

A :class:`Bench` holds the prepared model; a :class:`Run` is one method's go at one rate and seed, with a meter on what it spends
and a trace of the plan it would answer with. Plans are judged on text that no method has seen, by the engine's exact score.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.data import original, text
from selfpruner.config import SearchConfig
from selfpruner.errors import SelfprunerError, TextError
from selfpruner.evaluation.tally import Score
from selfpruner.evolution.evaluator import SLOPE_PASSES, Evaluator
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import session_of
from selfpruner.judging.corpora import joined_rows
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Granularity, Plan, SearchSpace
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.records import Candidate, Evaluation, LlmCall, Progress, Severity, Window
from selfpruner.stages import Stage
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import (
    EvaluateRequest,
    EvaluateResult,
    Levels,
    PrepareRequest,
    PrepareResult,
    R,
    ScoreRow,
    SlopesRequest,
    TaskRequest,
    TaskResult,
)
from selfpruner.workers.thread_pool import InProcessPool

WIKITEXT = {"wikitext2-512": 512, "wikitext2-2048": 2048}
C4 = "c4-512"
C4_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a result depends on beside method, rate and seed. Tokens are per plan, ``budget`` in plans times tokens."""

    model: str
    criterion: str
    compensation: str
    budget: int
    calibration: tuple[int, int] = (64, 512)
    fitness: tuple[int, int] = (512, 256)
    held_out: int = 32_768
    held_out_from: int = 0  # so many tokens of every held-out text are passed over: what was looked at while methods were made
    trace: int = 8192
    dtype: str = "auto"
    device: str = "auto"

    def fingerprint(self, *more: Any) -> str:
        return hashlib.sha256(json.dumps([asdict(self), *more], sort_keys=True).encode()).hexdigest()[:16]

    def config(self, cache: Path, rate: float, **fields: Any) -> SearchConfig:
        """The config of a search on the judge's model and texts; ``fields`` are a method's own."""
        c4 = [{"source": text("c4", cache)}]
        reported = (self.trace + self.held_out_from + self.held_out) // C4_LENGTH
        return SearchConfig.model_validate(
            {
                "model": self.model,
                "rate": rate,
                "preset": "evolution",
                "criterion": self.criterion,
                "compensation": self.compensation,
                "calibration": {"sources": c4, "sequences": self.calibration[0], "length": self.calibration[1]},
                "fitness_text": {"sources": c4, "sequences": self.fitness[0], "length": self.fitness[1]},
                "report_text": {"sources": c4, "sequences": reported, "length": C4_LENGTH},
                "dtype": self.dtype,
                "device": self.device,
                **fields,
            }
        )


class BudgetSpentError(Exception):
    """The next evaluation would pass the budget of fitness tokens. None of the product's errors, so that no search handles it."""


class Meter:
    """A pool that counts what is scored on the fitness text, and refuses what would pass the budget."""

    workers = 1

    def __init__(self, pool: WorkerPool, length: int, budget: int) -> None:
        self._pool, self._length, self._budget = pool, length, budget
        self.tokens = 0
        self.evaluations = 0

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        if isinstance(request, EvaluateRequest) and request.text == "fitness":
            asked = len(request.plans) * len(request.sequences) * self._length
            if self.tokens + asked > self._budget:
                spent = f"{self.tokens:,} are spent"
                raise BudgetSpentError(f"{asked:,} more tokens would pass the budget of {self._budget:,}; {spent}.")
        result = await self._pool.run(session, request, on_progress)
        if isinstance(request, SlopesRequest) and request.text == "fitness":
            # A walk forth and back counts as the passes it is worth.
            passes = SLOPE_PASSES + len(request.moves) // len(request.plan)
            self.tokens += passes * len(request.sequences) * self._length
        if isinstance(request, EvaluateRequest) and request.text == "fitness" and isinstance(result, EvaluateResult):
            self.tokens += sum(row.tokens for row in result.rows)
            self.evaluations += len(result.rows)
        return result

    async def close(self) -> None:
        await self._pool.close()


@dataclass(frozen=True, slots=True)
class Point:
    """From here on the method would have answered ``levels``; tokens and seconds since its start."""

    tokens: int
    seconds: float
    levels: tuple[int, ...]


@dataclass
class Run:
    """One method at one rate and seed. ``space`` starts every method from the uniform plan; ``sequences`` are those of the
    fitness text, ``signals`` what the worker measured on the dense model."""

    session: Session
    space: SearchSpace
    pool: Meter
    seed: int
    budget: int
    sequences: int
    length: int
    signals: Signals = field(default_factory=Signals)

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.ended: float | None = None
        self.uniform = self.space.project([self.space.rate] * self.space.layers)
        self.trace = [Point(0, 0.0, self.uniform.levels)]
        self.recorder = TraceRecorder(self)
        self.evaluator = Evaluator(self.pool, self.session, self.recorder)
        self.rng = random.Random(f"judge:{self.seed}")
        self._order: list[int] = []

    @property
    def incumbent(self) -> Plan:
        return Plan(self.trace[-1].levels)

    @property
    def left(self) -> int:
        """Fitness tokens that may still be spent."""
        return self.budget - self.pool.tokens

    def note(self, plan: Plan) -> None:
        """The plan the method would answer with now."""
        if plan.levels != self.trace[-1].levels:
            self.trace.append(Point(self.pool.tokens, time.perf_counter() - self.started, plan.levels))

    def answered_at(self, point: Point) -> None:
        """The method's answer is that of ``point``, and what was spent after it was not needed."""
        self.trace[1:] = [point]
        self.pool.tokens, self.ended = point.tokens, point.seconds

    def count(self, tokens: int) -> int:
        """Sequences that hold ``tokens`` tokens; the whole text where it is shorter."""
        return min(-(-tokens // self.length), self.sequences)

    def fresh(self, tokens: int) -> tuple[int, ...]:
        """The next :meth:`count` sequences of the fitness text, in this seed's order; a new order when they run out."""
        count = self.count(tokens)
        if len(self._order) < count:
            self._order = self.rng.sample(range(self.sequences), self.sequences)
        taken, self._order = self._order[:count], self._order[count:]
        return tuple(sorted(taken))

    async def score(self, plans: Sequence[Plan], sequences: Sequence[int]) -> list[float]:
        """KL of each plan on these sequences, in nats per token; infinite where there is none."""
        window = Window(",".join(map(str, sequences)), "fitness", tuple(sequences))
        scores = await self.evaluator.score(plans, [window])
        return [kl if math.isfinite(kl := scores[plan.hash].kl) else math.inf for plan in plans]


class TraceRecorder:
    """The search's recorder, in memory: what it would have stored is kept for the run, and its best plan goes to the trace."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.evaluations: dict[tuple[str, str], Evaluation] = {}
        self.calls: dict[int, LlmCall] = {}
        self.levels: dict[str, tuple[int, ...]] = {}
        self.first: dict[str, Point] = {}  # the first plan of every operator, and what had been spent when it was made

    def find_evaluation(self, plan_hash: str, window: str) -> Evaluation | None:
        return self.evaluations.get((plan_hash, window))

    def save_evaluations(self, rows: Sequence[Evaluation]) -> None:
        for row in rows:
            self.evaluations.setdefault((row.plan_hash, row.window), row)

    def find_llm_call(self, sequence: int) -> LlmCall | None:
        return self.calls.get(sequence)

    def save_llm_call(self, call: LlmCall) -> None:
        self.calls.setdefault(call.sequence, call)

    def save_candidates(self, rows: Sequence[Candidate]) -> None:
        for row in rows:
            if row.plan_hash not in self.levels:
                self.levels[row.plan_hash] = row.levels
                now = Point(self._run.pool.tokens, time.perf_counter() - self._run.started, row.levels)
                self.first.setdefault(row.operator, now)

    def event(self, key: str, type: str, message: str, *, level: Severity = "info", data: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        best = (data or {}).get("best")
        if best in self.levels:
            self._run.note(Plan(self.levels[best]))

    def find_event(self, key: str) -> Mapping[str, Any] | None:  # noqa: ARG002
        """A trace never goes on."""
        return None

    def progress(self, progress: Progress) -> None:
        """Nobody watches."""

    def find_stages(self) -> Sequence[Stage]:
        return ()

    def save_stages(self, stages: Sequence[Stage]) -> None:
        """Nobody asks where the time went."""


class JudgeResult(TaskResult):
    rows: tuple[ScoreRow, ...]


class JudgeRequest(TaskRequest[JudgeResult]):
    """Score plans on WikiText-2 test: ``sequences`` of ``length`` tokens, from number ``first`` on."""

    kind: ClassVar[str] = "judge"
    plans: tuple[Levels, ...]
    length: int
    first: int
    sequences: int


class JudgeHandler(SessionHandler):
    """A worker's handler that also judges."""

    def __init__(self, device: str = "auto") -> None:
        super().__init__(device)
        self._tasks[JudgeRequest] = self._judge
        self._wikitext: Tensor | None = None

    def _judge(self, session: Session, request: JudgeRequest, progress: OnProgress, cancelled: Cancelled) -> JudgeResult:
        prepared = self._session(session, progress, cancelled)
        length, first, sequences = request.length, request.first, request.sequences
        if self._wikitext is None:
            tokenizer: Any = prepared.loaded.tokenizer
            ids = tokenizer(joined_rows(original("wikitext2-test").read_text("utf-8")), verbose=False)["input_ids"]
            self._wikitext = torch.tensor(ids, dtype=torch.int64)
        asked = self._wikitext[length * first : length * (first + sequences)]
        if asked.numel() < length * sequences:
            wanted = f"{sequences} sequences of {length} from number {first} on"
            raise TextError(f"WikiText-2 test has {self._wikitext.numel():,} tokens; {wanted} are asked.")
        tokens = asked.view(sequences, length)
        plans = [Plan(levels) for levels in request.plans]
        scores = prepared.engine.evaluate(plans, tokens, cancelled=cancelled)
        return JudgeResult(rows=tuple(ScoreRow(kl=score.kl, nll=score.nll, tokens=score.tokens) for score in scores))


def _score(row: ScoreRow) -> Score:
    if row.kl is None or row.nll is None:
        raise SelfprunerError(f"A plan cannot be scored on the held-out text: {row.reason}", code="no_score")
    return Score(row.kl, row.nll, row.tokens)


class Bench:
    """The prepared model: one session for all rates, since a rate changes nothing but the budget of the space."""

    def __init__(self, settings: Settings, rates: Sequence[float], cache: Path, pool: WorkerPool | None = None) -> None:
        self.settings = settings
        self.pool = pool or InProcessPool(lambda: JudgeHandler(settings.device))
        config = settings.config(cache, min(rates), initial=("uniform", "ramp", "sensitivity", "alpha"))  # whose signals are wanted
        self.session = session_of(config, cache)
        self.held: PrepareResult | None = None
        sequences = config.report_text.sequences
        # Part of the report text draws the curves, the rest judges the final plans.
        traced = settings.trace // C4_LENGTH
        chosen = set(random.Random("trace").sample(range(sequences), traced))
        self._trace = [index for index in range(sequences) if index in chosen]
        self._held_out = [index for index in range(sequences) if index not in chosen][settings.held_out_from // C4_LENGTH :]

    async def prepare(self, tell: Callable[[str], None]) -> None:
        self.held = await self.pool.run(self.session, PrepareRequest(), tell)
        await self.trace_kl([self.held.space.dense])  # what a device does at its first walk is no method's time

    @property
    def prepared(self) -> PrepareResult:
        assert self.held is not None, "prepare comes first"
        return self.held

    def space(self, rate: float, granularity: Granularity = "block") -> SearchSpace:
        return replace(self.prepared.space, rate=rate, granularity=granularity)

    def run(self, rate: float, seed: int, granularity: Granularity = "block") -> Run:
        sequences, length = self.settings.fitness
        meter = Meter(self.pool, length, self.settings.budget)
        space, signals = self.space(rate, granularity), self.prepared.signals
        return Run(self.session, space, meter, seed, self.settings.budget, sequences, length, signals)

    async def trace_kl(self, plans: Sequence[Plan]) -> list[float]:
        """KL on the text that draws the curves."""
        return [score.kl for score in await self._reported(plans, self._trace)]

    async def held_out(self, plan: Plan) -> dict[str, dict[str, float]]:
        """KL and perplexity on every held-out text."""
        scores = {C4: (await self._reported([plan], self._held_out))[0]}
        for name, length in WIKITEXT.items():
            first, sequences = self.settings.held_out_from // length, self.settings.held_out // length
            asked = JudgeRequest(plans=(plan.levels,), length=length, first=first, sequences=sequences)
            scores[name] = _score((await self.pool.run(self.session, asked)).rows[0])
        return {name: {"kl": score.kl, "perplexity": score.perplexity} for name, score in sorted(scores.items(), reverse=True)}

    async def _reported(self, plans: Sequence[Plan], sequences: Sequence[int], batch: int = 16) -> list[Score]:
        rows: list[ScoreRow] = []
        for start in range(0, len(plans), batch):
            asked = tuple(plan.levels for plan in plans[start : start + batch])
            request = EvaluateRequest(plans=asked, text="report", sequences=tuple(sequences))
            rows += (await self.pool.run(self.session, request)).rows
        return [_score(row) for row in rows]

    @property
    def device(self) -> str:
        name, dtype = self.prepared.device, self.prepared.dtype
        return (
            f"{torch.cuda.get_device_name()} ({dtype})"
            if name.startswith("cuda")
            else (f"{name}, {torch.get_num_threads()} threads ({dtype})")
        )

    async def close(self) -> None:
        await self.pool.close()


async def judged(bench: Bench, run: Run, method: Callable[[Run], Any]) -> dict[str, Any]:
    """Let ``method`` run, then score its answer and the way to it: a plain record of everything that is reported."""
    try:
        plan: Plan = await method(run)
        run.note(plan)
    except* BudgetSpentError:
        plan = run.incumbent
    seconds = time.perf_counter() - run.started if run.ended is None else run.ended
    levels = list(dict.fromkeys(point.levels for point in run.trace))
    curve = dict(zip(levels, await bench.trace_kl([Plan(each) for each in levels]), strict=True))
    return {
        "rate": run.space.rate,
        "device": f"{bench.device}, torch {torch.__version__}",
        "seed": run.seed,
        "tokens": run.pool.tokens,
        "evaluations": run.pool.evaluations,
        "seconds": round(seconds, 2),
        "plan": list(plan.levels),
        "layer_rates": [round(rate, 4) for rate in run.space.layer_rates(plan)],
        "removed": run.space.removed(plan),
        "llm_calls": len(run.recorder.calls),
        "held_out": await bench.held_out(plan),
        "trace": [
            {"tokens": p.tokens, "seconds": round(p.seconds, 2), "levels": list(p.levels), "kl": curve[p.levels]} for p in run.trace
        ],
    }
