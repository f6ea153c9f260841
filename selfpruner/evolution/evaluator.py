"""From plans and windows to fitness: recorded results first, then the workers. Everything is stored before it is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from selfpruner.errors import ConfigError, OutOfMemoryError
from selfpruner.evaluation import split
from selfpruner.planning.space import Plan
from selfpruner.records import Evaluation, EvaluationOutcome, Recorder, Window
from selfpruner.stages import Stages
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import EvaluateRequest, GenerateRequest, RaceTerms, ScoreRow, SlopesRequest

# A race drops a plan that is worse than the last survivor at this confidence (one-sided, normal).
CONFIDENCE = 0.995
# Weights of the two terms of a foreseen change, and what its walk is worth in plan passes. Fitted to 101 measured single moves
# around a closed-form plan of SmolLM2-135M, on whose tokens they leave 1.5 of 5.3 thousandths of a nat (benchmarks/README.md).
FIRST, OWN = 0.92, 0.7
SLOPE_PASSES = 5
_NOT_FINITE = "the fitness is not finite"


@dataclass(frozen=True, slots=True)
class Fitness:
    """Token-weighted means over the windows asked for; there are none unless the ``outcome`` is ok, and ``reason`` tells people
    why. ``seconds`` went into scoring the plan; ``rejected``: a race ended early for it, and its means are estimates from the
    tokens it got."""

    kl: float
    nll: float
    tokens: int
    reason: str | None = None
    seconds: float = 0.0
    rejected: bool = False
    outcome: EvaluationOutcome = "ok"

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))

    def value(self, metric: str) -> float:
        return self.kl if metric == "kl" else self.nll


class Evaluator:
    """Scores plans through a pool. A generation's missing plans go out together, so that they share their prefixes, over all
    workers (:mod:`selfpruner.evaluation.split`).

    A plan that does not fit a device's memory alone is stored as failed with that reason. ``evaluations`` counts (plan, window)
    pairs scored, ``tokens`` the plan-tokens that took; ``stages`` are the job's, where tokens that were not scored before count.
    """

    def __init__(self, pool: WorkerPool, session: Session, recorder: Recorder, stages: Stages | None = None) -> None:
        self.stages = stages or Stages()
        self._pool = pool
        self._session = session
        self._recorder = recorder
        self.evaluations = 0
        self.tokens = 0
        self.seconds = 0.0
        self._counted: set[tuple[str, str]] = set()
        self.plans: set[str] = set()

    async def score(
        self, plans: Sequence[Plan], windows: Sequence[Window], *, contenders: Collection[str] = (), keep: int = 0
    ) -> dict[str, Fitness]:
        """Fitness per plan hash, over all ``windows`` together.

        With ``contenders`` (hashes) and ``keep`` the last window is a race: a contender that will hardly be among the best
        ``keep`` of them gets no more tokens, and its fitness says so.
        """
        parts: dict[str, list[Evaluation]] = {plan.hash: [] for plan in plans}
        unique = list({plan.hash: plan for plan in plans}.values())
        for number, window in enumerate(windows):
            known = {plan.hash: self._recorder.find_evaluation(plan.hash, window.name) for plan in unique}
            missing = [plan for plan in unique if known[plan.hash] is None]
            racing = contenders if number == len(windows) - 1 else ()
            fresh = {row.plan_hash: row for row in await self._evaluate(missing, window, racing, keep)}
            for plan in unique:
                row = known[plan.hash] or fresh[plan.hash]
                parts[plan.hash].append(row)
                if (plan.hash, window.name) not in self._counted:
                    self._counted.add((plan.hash, window.name))
                    self.tokens += row.tokens
            self.evaluations += len(unique)
        self.plans.update(parts)
        return {plan_hash: _mean(rows) for plan_hash, rows in parts.items()}

    async def repetition(self, plans: Mapping[str, Plan], window: Window, *, prompt: int, new_tokens: int) -> dict[str, float]:
        """How much greedy continuations repeat themselves, by the name of the plan and, as ``dense``, of the model unpruned.

        ``window`` gives the prompts: the first ``prompt`` tokens of its sequences. Not recorded; the same question has the same
        answer. Raises what the task raises: a ConfigError where the worker cannot write.
        """
        if not plans:
            return {}
        dense = (0,) * len(next(iter(plans.values())).levels)
        request = GenerateRequest(
            plans={"dense": dense, **{name: plan.levels for name, plan in plans.items()}},
            text=window.text,
            sequences=window.sequences,
            prompt=prompt,
            new_tokens=new_tokens,
        )
        result = await split.generate(self._pool, self._session, request)
        self.stages.count(len(request.plans) * len(window.sequences) * new_tokens)
        return result.repetition

    async def predict_changes(
        self, plan: Plan, moves: Mapping[tuple[int, int], float], window: Window
    ) -> tuple[float, dict[tuple[int, int], float]] | None:
        """The plan's KL, and the expected change of it by every move (block, level) away from ``plan``, in nats, all from one walk
        forth and back; ``moves`` gives the nats that a block's own output costs when all its energy is lost. None where the worker
        cannot.

        Kept as estimates of the plans moved to, so a resumed search asks nobody.
        """
        plans = {move: Plan((*plan.levels[: move[0]], move[1], *plan.levels[move[0] + 1 :])) for move in moves}
        known = {move: self._recorder.find_evaluation(moved.hash, window.name) for move, moved in plans.items()}
        base = self._recorder.find_evaluation(plan.hash, window.name)
        if base is None or any(row is None for row in known.values()):
            request = SlopesRequest(
                plan=plan.levels, moves=tuple(moves), text=window.text, sequences=window.sequences, piece=window.piece
            )
            try:
                result = await split.slopes(self._pool, self._session, request)
            except (ConfigError, OutOfMemoryError):
                return None
            kl, tokens = result.kl, result.tokens
            each = result.seconds / (len(moves) + 1)
            # The walk's whole cost stands at the plan it went around; what it foresees costs nothing more.
            spent = tokens * (SLOPE_PASSES + len(moves) // max(len(plan.levels), 1))
            base = Evaluation(plan.hash, window.name, spent, kl, None, each)
            rows = [base]
            for (move, weight), first, size in zip(moves.items(), result.first, result.size, strict=True):
                expected = max(kl + FIRST * first + OWN * weight * size, 0.0)
                known[move] = Evaluation(
                    plans[move].hash, window.name, 0, expected, None, each, "foreseen from slopes", kind="foreseen"
                )
                rows.append(known[move])  # type: ignore[arg-type]
            self._recorder.save_evaluations(rows)
            self.stages.count(spent)
        self.tokens += base.tokens
        self.seconds += base.seconds * (len(moves) + 1)
        kl = base.kl or 0.0
        return kl, {move: (row.kl or 0.0) - kl for move, row in known.items() if row is not None}

    async def _evaluate(self, plans: Sequence[Plan], window: Window, contenders: Collection[str], keep: int) -> list[Evaluation]:
        if not plans:
            return []
        racing = tuple(index for index, plan in enumerate(plans) if plan.hash in contenders)
        request = EvaluateRequest(
            plans=tuple(plan.levels for plan in plans),
            text=window.text,
            sequences=window.sequences,
            piece=window.piece,
            race=RaceTerms(keep=keep, contenders=racing, confidence=CONFIDENCE) if len(racing) > keep > 0 else None,
        )
        result = await split.evaluate(self._pool, self._session, request)
        tokens = sum(row.tokens for row in result.rows)
        self.stages.count(tokens)
        rows = [
            _recorded(plan, window, row, result.seconds * row.tokens / max(tokens, 1))
            for plan, row in zip(plans, result.rows, strict=True)
        ]
        if result.tasks > 1:
            self._recorder.event(
                f"split-{window.name}",
                "search.split",
                f"{len(plans)} plans scored on {window.name} by {result.tasks} tasks, up to {self._pool.workers} at a time.",
                data={"window": window.name, "plans": len(plans), "tasks": result.tasks, "workers": self._pool.workers},
            )
        self._recorder.save_evaluations(rows)
        return rows


def _recorded(plan: Plan, window: Window, row: ScoreRow, seconds: float) -> Evaluation:
    finite = row.kl is not None and row.nll is not None
    return Evaluation(
        plan.hash,
        window.name,
        row.tokens,
        row.kl,
        row.nll,
        seconds,
        _reason(row, finite=finite),
        kind="raced" if row.rejected else "measured",
        outcome="ok" if finite else "out_of_memory" if row.too_large else "not_finite",
    )


def _reason(row: ScoreRow, *, finite: bool) -> str | None:
    if not finite:
        return row.reason or _NOT_FINITE
    return f"rejected early after {row.tokens} tokens" if row.rejected else None


def _mean(rows: Sequence[Evaluation]) -> Fitness:
    tokens = sum(row.tokens for row in rows)
    seconds = math.fsum(row.seconds for row in rows)
    for row in rows:
        if row.kl is None or row.nll is None:
            outcome = "not_finite" if row.outcome == "ok" else row.outcome
            return Fitness(math.nan, math.nan, tokens, row.reason or _NOT_FINITE, seconds, outcome=outcome)
    kl = math.fsum((row.kl or 0.0) * row.tokens for row in rows) / max(tokens, 1)
    nll = math.fsum((row.nll or 0.0) * row.tokens for row in rows) / max(tokens, 1)
    return Fitness(kl, nll, tokens, None, seconds, rejected=any(row.kind == "raced" for row in rows))
