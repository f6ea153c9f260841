"""What a search knows so far, and how plans compare with each other.

A plan's ``relative`` fitness is its fitness over the uniform plan's on the same tokens. Every generation has fresh tokens, so the
standing of a plan that stays is pooled over all tokens it was scored on. A newcomer is measured against the leader on the tokens
they share, times the leader's pooled standing: two similar plans differ far less noisily on the same tokens than either does from
the uniform plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from selfpruner.config import SearchConfig
from selfpruner.evolution.evaluator import Fitness
from selfpruner.operators.base import Context, Hint, Reflections, Refused
from selfpruner.planning.landscape import Landscape
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.records import Candidate, Window

NOTES_SHOWN = 8


@dataclass
class State:
    """One search's memory. ``population`` is sorted, best first."""

    config: SearchConfig
    space: SearchSpace
    signals: Signals = field(default_factory=Signals)
    candidates: dict[str, Candidate] = field(default_factory=dict)
    population: list[Candidate] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    sensitivities: list[float] = field(default_factory=list)
    probe_levels: list[int] = field(default_factory=list)
    landscape: Landscape | None = None
    reflections: Reflections = field(default_factory=Reflections)
    stale: int = 0
    made: Counter[str] = field(default_factory=Counter)
    improved: Counter[str] = field(default_factory=Counter)
    _pools: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def leader(self) -> Candidate | None:
        return self.population[0] if self.population else None

    def context(
        self,
        generation: int,
        parents: Sequence[tuple[Candidate, Candidate]] = (),
        pending: Sequence[Candidate] = (),
    ) -> Context:
        """What operators may know now."""
        return Context(
            space=self.space,
            generation=generation,
            generations=self.config.generations,
            population=tuple(self.population),
            history=tuple(sorted((c for c in self.candidates.values() if c.status == "evaluated"), key=standing)),
            pending=tuple(pending),
            sensitivities=tuple(self.sensitivities),
            probe_levels=tuple(self.probe_levels),
            seen=frozenset(self.candidates),
            refused=tuple(self.refused[-NOTES_SHOWN:]),
            parents=tuple(parents),
            metric=self.config.fitness,
            stale_generations=self.stale,
            reflections=self.reflections,
            hints=self.hints(),
            landscape=self.landscape,
            signals=self.signals,
        )

    def hints(self) -> tuple[Hint, ...]:
        """Per block of the leader: the expected change in percent when it keeps one step more, paid for at the going price."""
        leader = self.leader
        if self.landscape is None or leader is None or not leader.fitness:
            return ()
        return tuple(
            Hint(block, round(100 * change / leader.fitness, 2))
            for block, change in self.landscape.exchanges(Plan(leader.levels))
            if math.isfinite(change)
        )

    def ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Best first. Once the landscape has learnt anything, plans stand by what it expects of them: a child's own tokens are few
        and noisy, and the model has weighed them together with everything else. But none passes the leader that did not beat it
        where both were measured."""
        scored = sorted((c for c in candidates if c.status == "evaluated"), key=standing)
        landscape, leader = self.landscape, self.leader
        if landscape is None or leader is None or not landscape.differences:
            return scored
        here = Plan(leader.levels)
        expected = {c.plan_hash: landscape.change(Plan(c.levels), here) for c in scored}
        return sorted(scored, key=lambda c: (standing(c) > standing(leader), expected[c.plan_hash], c.plan_hash))

    # -- standing ------------------------------------------------------------------------------------------------------
    def judge(self, candidate: Candidate, fitness: Fitness, uniform: float, leader: Mark | None, windows: Sequence[Window]) -> None:
        """Give ``candidate`` its fitness on ``windows``. ``uniform`` is the uniform plan's value there, ``leader`` where the leader
        stood before, and its value there (None where there is none yet)."""
        value = fitness.value(self.config.fitness)
        candidate.window = "+".join(window.name for window in windows)
        candidate.tokens = fitness.tokens
        candidate.rejected = fitness.rejected
        if fitness.outcome != "ok" or not math.isfinite(value):
            candidate.status = "failed" if fitness.outcome == "out_of_memory" else "infeasible"
            candidate.rejected = False
            candidate.reason = fitness.reason or "the fitness is not a number"
            candidate.fitness = candidate.relative = None
            return
        candidate.status = "evaluated"
        candidate.reason = f"rejected early after {fitness.tokens} tokens" if fitness.rejected else None
        candidate.fitness = value
        if leader is not None and leader.relative is not None and leader.value > 0:
            candidate.relative = leader.relative * value / leader.value
        else:
            candidate.relative = value / uniform if uniform > 0 else None

    def admit(self, candidate: Candidate, uniform: float, tokens: int) -> None:
        """A newcomer's standing is worth the ``tokens`` it was scored on."""
        if candidate.relative is not None and uniform > 0:
            self._pools[candidate.plan_hash] = candidate.relative * uniform * tokens, uniform * tokens

    def pool(self, candidate: Candidate, uniform: float, tokens: int) -> None:
        """Add a window to the standing of a plan that stays: ``candidate.fitness`` and the uniform plan's on ``tokens`` tokens."""
        if candidate.fitness is None or uniform <= 0:
            return
        mine, reference = self._pools.get(candidate.plan_hash, (0.0, 0.0))
        mine, reference = mine + candidate.fitness * tokens, reference + uniform * tokens
        self._pools[candidate.plan_hash] = mine, reference
        candidate.relative = mine / reference


@dataclass(frozen=True, slots=True)
class Mark:
    """What others are measured against: a plan's standing before, and its value on the tokens they share."""

    relative: float | None
    value: float


def standing(candidate: Candidate) -> tuple[float, str]:
    """Sort key: relative fitness, which exists for every evaluated candidate; equal ones by hash, so that order is stable."""
    value = candidate.relative if candidate.relative is not None else candidate.fitness
    return (value if value is not None else float("inf"), candidate.plan_hash)
