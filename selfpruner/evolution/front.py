"""The Pareto front of a job: the best plan for every rate, or for every latency, from one search.

What a search learns about its model holds for other rates and objectives too. Good plans of another rate are its best plan
scaled, the plan of smallest loss by the probes of the dense model, and mixtures of both. Faster plans of the same size come from
a dynamic programme on loss + weight * latency for a range of weights, since both are sums over blocks. These plans are scored on
fresh tokens; the best of each rate go on to the final's tokens. The front holds those that no other plan scored there beats on
one objective without losing on another.

All plans of one rate meet its budget, so they count as equally large. A plan's latency is the sum of its blocks'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from selfpruner.config import SearchConfig
from selfpruner.errors import BudgetError
from selfpruner.evolution.evaluator import Evaluator, Fitness
from selfpruner.evolution.state import State
from selfpruner.evolution.windows import Windows
from selfpruner.planning.allocation import cheapest, predicted_losses
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.records import Candidate, Recorder, Window

if TYPE_CHECKING:
    from selfpruner.evolution.outcome import Outcome

T = TypeVar("T")

NAME = "front"
# Exchange rates of the dynamic programme: so many percent of the predicted loss for one percent of the latency.
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# How far from the job's best plan a faster one may turn a block, as a share of its parameters: what the landscape has learnt is
# true near that plan.
RADII = (0.1, 0.3)
# Shares of the scaled plan in mixtures with the one of smallest loss by the probes, which were taken near the dense model.
MIXTURES = (0.75, 0.5, 0.25)
# Latencies nearer than this share of the dense model's count as equal: less than a measurement can tell.
ALIKE = 0.005
# Plans of a rate that go on to the final's tokens: with latency several points, without it the best and its rival.
KEEP, KEEP_POINTS = 2, 5


@dataclass(frozen=True, slots=True)
class Latencies:
    """Microseconds of a prefill of ``tokens`` tokens: per block and level, and of the rest of the model (``time_blocks``)."""

    tokens: int
    blocks: tuple[tuple[float, ...], ...]
    rest: float

    def of(self, plan: Plan) -> float:
        return self.rest + math.fsum(times[level] for times, level in zip(self.blocks, plan.levels, strict=True))

    def steps(self, plan: Plan) -> int:
        """The plan's latency, counted in the smallest difference that matters."""
        return round(self.of(plan) / (ALIKE * self.of(Plan((0,) * len(plan.levels)))))


@dataclass(frozen=True, slots=True)
class Member:
    """A plan at the point ``rate`` of the front. ``costs``: what of the objective is to be small beside the fitness."""

    candidate: Candidate
    fitness: Fitness
    rate: float
    latency: float | None
    costs: tuple[float, ...]

    @property
    def plan(self) -> Plan:
        return Plan(self.candidate.levels)

    def values(self, metric: str) -> tuple[float, ...]:
        """The figures to be minimised, fitness first."""
        return (self.fitness.value(metric), *self.costs)


def front_tokens(config: SearchConfig, windows: Windows) -> int:
    """The most plan-tokens that a front can cost; 0 for a job without one."""
    if len(config.objective) == 1:
        return 0
    timed, other = "latency" in config.objective, len(config.front_rates) - 1
    per_rate = (3 + len(MIXTURES)) * other + (len(RADII) * len(WEIGHTS) * (other + 1) + KEEP_POINTS + 2) * timed
    kept = KEEP_POINTS * (other + 1) if timed else KEEP * other
    stages = sum(len(window.sequences) for window in windows.generation(0))
    return windows.length * (per_rate * stages + kept * len(windows.final.sequences))


class Front:
    """Makes the front of one job. Raises BudgetError at once when a rate cannot be reached."""

    def __init__(
        self, config: SearchConfig, space: SearchSpace, evaluator: Evaluator, recorder: Recorder, windows: Windows
    ) -> None:
        self.config = config
        self.evaluator = evaluator
        self.recorder = recorder
        self.windows = windows
        self.space = space
        self.spaces = {rate: space if rate == config.rate else _at(space, rate) for rate in config.front_rates}

    async def make(
        self,
        state: State,
        outcome: Outcome,
        latencies: Latencies | None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> tuple[Outcome, list[Member]]:
        """The front, best quality first, and the outcome with what the front added: plans, tokens, and the best plan itself where
        one of the job's rate beats it in every objective. Finalists that were fitter than the best and not chosen stay out."""
        best, metric = outcome.best, self.config.fitness
        finalists = [c for c in outcome.finalists if c is best or (c.fitness or 0.0) >= (best.fitness or 0.0)]
        rate_of = {candidate.plan_hash: self.config.rate for candidate in outcome.finalists}
        fresh: list[Candidate] = []
        challengers: list[Candidate] = []
        for rate, plan in self._proposals(state, Plan(best.levels), latencies):
            if plan.hash in rate_of:
                continue
            rate_of[plan.hash] = rate
            if plan.hash not in state.candidates:
                state.candidates[plan.hash] = self._candidate(plan, best, outcome.generations)
                fresh.append(state.candidates[plan.hash])
            challengers.append(state.candidates[plan.hash])
        state.made[NAME] += len(fresh)
        self.recorder.save_candidates(fresh)

        def points(candidates: Sequence[Candidate], scores: Mapping[str, Fitness]) -> list[Member]:
            scored = [c for c in candidates if _finite(scores[c.plan_hash])]
            return [self._member(c, scores[c.plan_hash], rate_of[c.plan_hash], latencies) for c in scored]

        tell(f"front: {len(challengers)} plans of {len(self.spaces)} rates")
        scores = await self._score(state, fresh, challengers, outcome, self.windows.generation(outcome.generations + 1))
        chosen = self._chosen(points(challengers, scores))
        tell(f"front: re-scoring {len(chosen)} plans on unseen tokens")
        scores = await self._score(state, chosen, [*chosen, *finalists], outcome, [self.windows.final])
        self.evaluator.evaluations -= len(finalists)  # scored before
        entrants = points([*finalists, *chosen], scores)
        own = next(point for point in entrants if point.candidate is best)
        better = [p for p in entrants if p.rate == self.config.rate and _beats(p.values(metric), own.values(metric))]
        best = min([own, *better], key=lambda point: point.values(metric)).candidate
        members = front_of(entrants, metric)
        self._tell(members, len(fresh))
        return replace(outcome, best=best, made=dict(state.made), tokens=self.evaluator.tokens), members

    # -- proposing -----------------------------------------------------------------------------------------------------
    def _proposals(self, state: State, best: Plan, latencies: Latencies | None) -> list[tuple[float, Plan]]:
        """(rate, plan), distinct plans, without what the final has already scored for the job's own rate."""
        landscape = state.landscape
        assert landscape is not None, "a search with a front probes"
        learnt = [landscape.losses(around=best, radius=radius) for radius in RADII]
        probed = predicted_losses(self.space, state.sensitivities, state.probe_levels)
        between = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(landscape.losses(), probed, strict=True)]
        proposals: dict[str, tuple[float, Plan]] = {}
        for rate, space in self.spaces.items():
            scaled, plans, curves = best, [], learnt
            if rate != self.config.rate:
                curves = [probed, between]
                scaled = space.project([share * rate / self.config.rate for share in space.rates(best)])
                plans += [scaled, *(cheapest(space, losses) for losses in curves)]
                pairs = list(zip(space.rates(scaled), space.rates(plans[1]), strict=True))
                plans += [space.project([m * a + (1 - m) * b for a, b in pairs]) for m in MIXTURES]
            if latencies is not None:
                whole = math.fsum(losses[level] for losses, level in zip(probed, scaled.levels, strict=True))
                unit = max(whole, 1e-6) / latencies.of(scaled)
                plans += [cheapest(space, _with_latency(losses, latencies, w * unit)) for w in WEIGHTS for losses in curves]
            for plan in plans:
                proposals.setdefault(plan.hash, (rate, plan))
        if latencies is not None:
            for plan in self._fast_known(state, latencies):
                proposals.setdefault(plan.hash, (self.config.rate, plan))
        return list(proposals.values())

    def _fast_known(self, state: State, latencies: Latencies) -> list[Plan]:
        """Plans of the search that none beats both in standing and in latency."""
        known = [c for c in state.candidates.values() if c.status == "evaluated" and not c.rejected and c.relative is not None]
        rows = [((c.relative or 0.0, latencies.steps(Plan(c.levels))), Plan(c.levels)) for c in known]
        rows.sort(key=lambda row: (row[0], row[1].hash))
        return _spread([plan for values, plan in rows if not any(_beats(other, values) for other, _ in rows)], KEEP_POINTS)

    def _candidate(self, plan: Plan, best: Candidate, generation: int) -> Candidate:
        rates = tuple(round(rate, 6) for rate in self.space.rates(plan))
        return Candidate(plan.hash, plan.levels, rates, generation, NAME, (best.plan_hash,))

    # -- scoring -------------------------------------------------------------------------------------------------------
    async def _score(
        self,
        state: State,
        judged: Sequence[Candidate],
        scored: Sequence[Candidate],
        outcome: Outcome,
        windows: Sequence[Window],
    ) -> dict[str, Fitness]:
        """Fitness of ``scored``; ``judged`` ones are given it. Against the uniform plan only those of the job's own rate."""
        if not scored:
            return {}
        own = any(self.space.meets_budget(Plan(candidate.levels)) for candidate in judged)
        plans = [Plan(candidate.levels) for candidate in ([outcome.uniform, *scored] if own else scored)]
        scores = await self.evaluator.score(plans, windows)
        uniform = scores[outcome.uniform.plan_hash].value(self.config.fitness) if own else math.nan
        for candidate in judged:
            state.judge(candidate, scores[candidate.plan_hash], uniform, None, windows)
            if not self.space.meets_budget(Plan(candidate.levels)):
                candidate.relative = None
        self.recorder.save_candidates(judged)
        return scores

    def _member(self, candidate: Candidate, fitness: Fitness, rate: float, latencies: Latencies | None) -> Member:
        latency = None if latencies is None else latencies.of(Plan(candidate.levels))
        steps = 0 if latencies is None else latencies.steps(Plan(candidate.levels))
        costs = (-rate if name == "parameters" else float(steps) for name in self.config.objective[1:])
        return Member(candidate, fitness, rate, latency, tuple(costs))

    def _chosen(self, points: Sequence[Member]) -> list[Candidate]:
        """Who goes on: per rate the best, or with latency those that no plan of the same rate beats."""
        metric = self.config.fitness
        chosen: list[Member] = []
        for rate in self.spaces:
            here = [point for point in points if point.rate == rate]
            if "latency" in self.config.objective:
                chosen += _spread(front_of(here, metric), KEEP_POINTS)
            else:
                chosen += sorted(here, key=lambda point: (point.values(metric), point.candidate.plan_hash))[:KEEP]
        return [point.candidate for point in chosen]

    def _tell(self, members: Sequence[Member], made: int) -> None:
        rows = [
            {
                "plan": member.candidate.plan_hash,
                "rate": member.rate,
                "fitness": member.fitness.value(self.config.fitness),
                "operator": member.candidate.operator,
                **({} if member.latency is None else {"latency_us": round(member.latency, 1)}),
            }
            for member in members
        ]
        self.recorder.event(
            NAME,
            "search.front",
            f"Front over {' and '.join(self.config.objective)}: {len(members)} plans, of {made} made for it.",
            data={"members": rows, "made": made, "tokens": self.evaluator.tokens},
        )


def front_of(members: Sequence[Member], metric: str) -> list[Member]:
    """Those that no other beats: at least as good in everything and better in something. Best fitness first; of equal ones one."""
    ranked = sorted(members, key=lambda member: (member.values(metric), member.candidate.plan_hash))
    unlike = {member.values(metric): member for member in reversed(ranked)}
    return [unlike[values] for values in sorted(unlike) if not any(_beats(other, values) for other in unlike)]


def _at(space: SearchSpace, rate: float) -> SearchSpace:
    try:
        return replace(space, rate=rate)
    except BudgetError as error:
        raise BudgetError(error.message, param="rates") from None


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def _with_latency(losses: Sequence[Sequence[float]], latencies: Latencies, weight: float) -> list[list[float]]:
    return [
        [loss + weight * time for loss, time in zip(curve, times, strict=True)]
        for curve, times in zip(losses, latencies.blocks, strict=True)
    ]


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of them, the first and the last among them, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[round(step * (len(items) - 1) / (most - 1))] for step in range(most)]


def _finite(fitness: Fitness) -> bool:
    return fitness.outcome == "ok" and math.isfinite(fitness.kl) and math.isfinite(fitness.nll)
