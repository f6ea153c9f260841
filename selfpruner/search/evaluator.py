"""From plans and windows to fitness: recorded results first, then the workers, everything stored before it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from selfpruner.errors import OutOfMemoryError
from selfpruner.search.records import Evaluation, Recorder, Window
from selfpruner.space import Plan
from selfpruner.workers.base import Session, WorkerPool


@dataclass(frozen=True, slots=True)
class Fitness:
    """Token-weighted means over the windows asked for; ``reason`` says why there is none."""

    kl: float
    nll: float
    tokens: int
    reason: str | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))

    def value(self, metric: str) -> float:
        return self.kl if metric == "kl" else self.nll


class Evaluator:
    """Scores plans through a pool. A generation's missing plans go out as one task, so that they share their prefixes.

    When a device runs out of memory the batch is halved, again and again; a plan that does not fit alone is stored as failed
    with that reason. ``peak_mib`` is the largest worker seen, ``evaluations`` counts (plan, window) pairs scored.
    """

    def __init__(self, pool: WorkerPool, session: Session, recorder: Recorder) -> None:
        self._pool = pool
        self._session = session
        self._recorder = recorder
        self.evaluations = 0
        self.plans: set[str] = set()
        self.peak_mib = 0.0

    async def score(self, plans: Sequence[Plan], windows: Sequence[Window]) -> dict[str, Fitness]:
        """Fitness per plan hash, over all ``windows`` together."""
        parts: dict[str, list[Evaluation]] = {plan.hash: [] for plan in plans}
        unique = list({plan.hash: plan for plan in plans}.values())
        for window in windows:
            known = {plan.hash: self._recorder.find_evaluation(plan.hash, window.name) for plan in unique}
            missing = [plan for plan in unique if known[plan.hash] is None]
            fresh = {row.plan_hash: row for row in await self._evaluate(missing, window)}
            for plan in unique:
                row = known[plan.hash] or fresh[plan.hash]
                parts[plan.hash].append(row)
            self.evaluations += len(unique)
        self.plans.update(parts)
        return {plan_hash: _mean(rows) for plan_hash, rows in parts.items()}

    async def _evaluate(self, plans: Sequence[Plan], window: Window) -> list[Evaluation]:
        if not plans:
            return []
        payload = {"plans": [list(plan.levels) for plan in plans], "text": window.text, "sequences": list(window.sequences)}
        try:
            result = await self._pool.run(self._session, "evaluate", payload)
        except OutOfMemoryError as error:
            if len(plans) > 1:
                middle = len(plans) // 2
                first = await self._evaluate(plans[:middle], window)
                return first + await self._evaluate(plans[middle:], window)
            rows = [Evaluation(plan.hash, window.name, 0, None, None, 0.0, f"out of memory: {error.message}") for plan in plans]
        else:
            self.peak_mib = max(self.peak_mib, float(result.get("peak_mib", 0.0)))
            seconds = float(result["seconds"]) / len(plans)
            rows = [
                Evaluation(plan.hash, window.name, int(row["tokens"]), row["kl"], row["nll"], seconds, row.get("reason"))
                for plan, row in zip(plans, result["rows"], strict=True)
            ]
        self._recorder.save_evaluations(rows)
        return rows


def _mean(rows: Sequence[Evaluation]) -> Fitness:
    tokens = sum(row.tokens for row in rows)
    for row in rows:
        if row.kl is None or row.nll is None:
            return Fitness(math.nan, math.nan, tokens, row.reason or "the fitness is not finite")
    kl = math.fsum((row.kl or 0.0) * row.tokens for row in rows) / max(tokens, 1)
    nll = math.fsum((row.nll or 0.0) * row.tokens for row in rows) / max(tokens, 1)
    return Fitness(kl, nll, tokens)
