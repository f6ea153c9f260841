"""The four operators of Self-Pruner (arXiv 2502.14413) as questions to an LLM: initialize, select, crossover, mutate.

A reply is data: it is validated, scaled and projected onto the budget, and compared with what is known. Plans that fail are
noted for the next prompt; one good plan in a reply is enough. Questions get warmer the longer the search has been stuck.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from selfpruner.errors import BudgetError, ProposerError
from selfpruner.operators.base import Context, Offspring, Rejected
from selfpruner.operators.plan_format import Answer, PlanFormat, Plans, closed
from selfpruner.proposers.base import CallError
from selfpruner.proposers.channel import LlmChannel
from selfpruner.search.records import Candidate
from selfpruner.space import Plan

HEAT_PER_STALE_GENERATION = 0.1
_HISTORY = 24
_NOTES_SHOWN, _NOTES_KEPT = 5, 50
_OFF_TARGET = 5.0  # percentage points of the average rate that are worth a note


class _LlmOperator:
    """What the four have in common: the channel, the facts of a prompt, notes on what was rejected."""

    name: str

    def __init__(self, channel: LlmChannel) -> None:
        self.rejected: list[Rejected] = []
        self._channel = channel
        self._format: PlanFormat | None = None

    def _format_of(self, context: Context) -> PlanFormat:
        if self._format is None or self._format.space is not context.space:
            self._format = PlanFormat(context.space)
        return self._format

    def _facts(self, context: Context, count: int, example: str, history: Sequence[Candidate]) -> dict[str, Any]:
        """The variables every template needs. ``history``: best first."""
        plans = self._format_of(context)
        notes = dict.fromkeys(f"{note.operator}: {note.reason}" for note in (*context.rejected, *self.rejected))
        return {
            "layers": context.space.layers,
            "keys": plans.keys,
            "most": plans.most,
            "target": f"{plans.target:.3g}",
            "ffn_weight": plans.ffn_weight,
            "count": count,
            "example": example,
            "sensitivities": plans.sensitivities(context.sensitivities, context.probe_levels),
            "score_scale": _scale(context),
            "history": [self._entry(context, candidate) for candidate in reversed(history[:_HISTORY])],
            "rejected": list(notes)[-_NOTES_SHOWN:],
        }

    def _entry(self, context: Context, candidate: Candidate) -> dict[str, str]:
        rates = context.space.rates(Plan(candidate.levels))
        return {"score": score(context, candidate), "plan": self._format_of(context).write(rates)}

    def _note(self, reason: str) -> None:
        self.rejected.append(Rejected(self.name, reason))
        del self.rejected[:-_NOTES_KEPT]

    def _heat(self, context: Context) -> float:
        return HEAT_PER_STALE_GENERATION * context.stale_generations


class _PlanMaker(_LlmOperator, ABC):
    """An operator whose replies are plans: as many questions as it takes, a few plans each."""

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:
        """At most ``count`` new plans. Raises ProposerError when every question failed."""
        made: list[Offspring] = []
        failure: ProposerError | None = None
        slots = self._slots(context, count, rng)
        size = self._channel.settings.plans
        for start in range(0, len(slots), size):
            if not self._channel.open:
                break
            try:
                made += await self._ask(context, slots[start : start + size], made)
            except ProposerError as error:
                failure = error
        if failure is not None and not made:
            raise failure
        return made

    async def _ask(self, context: Context, slots: Sequence[tuple[Candidate, ...]], made: Sequence[Offspring]) -> list[Offspring]:
        """One question: plan number i of the answer comes from ``slots[i]``."""
        plans = self._format_of(context)
        shown = {parent.plan_hash for parents in slots for parent in parents}
        history = [candidate for candidate in context.history if candidate.plan_hash not in shown]
        variables = self._facts(context, len(slots), plans.example(min(len(slots), 2)), history)
        variables["parents"] = self._parents(context, slots)
        # Plans of this very generation have no score yet, and stand where they cannot pass for good ones.
        fresh = [{"score": "not scored", "plan": plans.write(context.space.rates(child.plan))} for child in made]
        variables["history"] = [*fresh, *variables["history"]]
        known = context.seen | {child.plan.hash for child in made}
        return await self._channel.ask(
            self.name,
            context.generation,
            variables,
            plans.schema(len(slots)),
            lambda reply: self._read(context, reply, slots, known),
            heat=self._heat(context),
        )

    def _read(
        self, context: Context, reply: dict[str, Any], slots: Sequence[tuple[Candidate, ...]], known: frozenset[str]
    ) -> list[Offspring]:
        """The new plans of a reply. ValueError when none fits the format, outcome ``no_new_plan`` when none is new."""
        plans = self._format_of(context)
        answered = Plans.model_validate(reply).plans[: len(slots)]
        children: list[Offspring] = []
        problems: list[str] = []
        repeated = 0
        for number, (answer, parents) in enumerate(zip(answered, slots, strict=False)):
            try:
                rates = plans.read(answer)
                plan = context.space.project(plans.near_target(rates))
            except (ValueError, BudgetError) as error:
                problems.append(f"plans.{number}: {error}")
                continue
            if plan.hash in known:
                repeated += 1
                self._note(f"a plan that was known already{_score_of(context, plan)}")
                continue
            if abs(plans.average(rates) - plans.target) > _OFF_TARGET:
                self._note(f"rates of average {plans.average(rates):.0f} were corrected to the target {plans.target:.3g}")
            known |= {plan.hash}
            children.append(Offspring(plan, self.name, tuple(parent.plan_hash for parent in parents)))
        if children:
            for problem in problems:
                self._note(problem)
            return children
        if repeated:
            raise CallError("Every plan of the answer was known already.", code="no_new_plan")
        raise ValueError("; ".join(problems[:2]))

    @abstractmethod
    def _slots(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, ...]]:
        """The parents of each plan to ask for."""

    @abstractmethod
    def _parents(self, context: Context, slots: Sequence[tuple[Candidate, ...]]) -> list[Any]:
        """What the prompt shows of them, in the form its template wants."""


class Initialize(_PlanMaker):
    """Plans from target and sensitivities alone."""

    name = "initialize"

    def _slots(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, ...]]:  # noqa: ARG002
        return [()] * count

    def _parents(self, context: Context, slots: Sequence[tuple[Candidate, ...]]) -> list[Any]:  # noqa: ARG002
        return []


class Crossover(_PlanMaker):
    """One plan from two parents."""

    name = "crossover"

    def _slots(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, ...]]:
        if context.parents:
            return _cycle([_best_last(pair) for pair in context.parents], count)
        if len(context.population) < 2:
            return []
        return [_best_last(tuple(_tournament(context.population, 2, rng))) for _ in range(count)]

    def _parents(self, context: Context, slots: Sequence[tuple[Candidate, ...]]) -> list[Any]:
        return [[self._entry(context, parent) for parent in pair] for pair in slots]


class Mutate(_PlanMaker):
    """One plan from one parent."""

    name = "mutate"

    def _slots(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, ...]]:
        chosen = dict.fromkeys(parent.plan_hash for pair in context.parents for parent in pair)
        if chosen:
            known = {parent.plan_hash: parent for pair in context.parents for parent in pair}
            return _cycle([(known[plan_hash],) for plan_hash in chosen], count)
        return [tuple(_tournament(context.population, 1, rng)) for _ in range(count)] if context.population else []

    def _parents(self, context: Context, slots: Sequence[tuple[Candidate, ...]]) -> list[Any]:
        return [self._entry(context, parent) for (parent,) in slots]


class Pairs(Answer):
    pairs: list[list[int]] = Field(min_length=1)


class Select(_LlmOperator):
    """The LLM chooses which candidates become parents."""

    name = "select"

    async def select(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, Candidate]]:
        """At most ``count`` pairs of different candidates of the population. Raises ProposerError when none came back."""
        shown = self._shown(context)
        if len(shown) < 2 or count < 1 or not self._channel.open:
            return []
        # The order tells a model which to prefer; a drawn one leaves only the scores.
        rng.shuffle(shown)
        count = min(count, 4 * self._channel.settings.plans)
        variables = self._facts(context, count, '{"pairs":[[1,3],[2,3]]}' if count > 1 else '{"pairs":[[1,3]]}', ())
        variables["candidates"] = [self._entry(context, candidate) for candidate in shown]
        number = {"type": "integer", "minimum": 1, "maximum": len(shown)}
        pair = {"type": "array", "items": number, "minItems": 2, "maxItems": 2}
        schema = closed({"pairs": {"type": "array", "items": pair, "minItems": count, "maxItems": count}})

        def read(reply: dict[str, Any]) -> list[tuple[Candidate, Candidate]]:
            answered = Pairs.model_validate(reply).pairs[:count]
            fitting = [p for p in answered if len(p) == 2 and p[0] != p[1] and all(1 <= n <= len(shown) for n in p)]
            if not fitting:
                raise ValueError(f"pairs: each must hold two different numbers from 1 to {len(shown)}")
            return [(shown[first - 1], shown[second - 1]) for first, second in fitting]

        return await self._channel.ask(self.name, context.generation, variables, schema, read, heat=self._heat(context))

    def _shown(self, context: Context) -> list[Candidate]:
        """The best of the population, as many as leave room for the rest of the prompt."""
        room = 0.6 * self._channel.settings.prompt_chars
        shown: list[Candidate] = []
        for candidate in context.population:
            room -= len(self._entry(context, candidate)["plan"]) + 12
            if room < 0 and len(shown) >= 2:
                break
            shown.append(candidate)
        return shown


OPERATORS: dict[str, Callable[[LlmChannel], Initialize | Crossover | Mutate | Select]] = {
    operator.name: operator for operator in (Initialize, Select, Crossover, Mutate)
}


def score(context: Context, candidate: Candidate) -> str:
    """A candidate's score in whole points: differences below one are noise a model would read meaning into."""
    if candidate.relative is not None:
        return f"{100 * candidate.relative:.0f}"
    best = _best_fitness(context)
    if candidate.fitness is None or best is None or best <= 0:
        return "unknown"
    return f"{100 * candidate.fitness / best:.0f}"


def _scale(context: Context) -> str:
    relative = any(candidate.relative is not None for candidate in (*context.history, *context.population))
    return f"100 = {'the uniform plan' if relative else 'the best known'}, lower is better"


def _best_fitness(context: Context) -> float | None:
    return min((c.fitness for c in (*context.history, *context.population) if c.fitness is not None), default=None)


def _score_of(context: Context, plan: Plan) -> str:
    known = next((candidate for candidate in context.history if candidate.plan_hash == plan.hash), None)
    return f" (score {score(context, known)})" if known is not None else ""


def _tournament(population: Sequence[Candidate], count: int, rng: random.Random) -> list[Candidate]:
    """``count`` different candidates, each the better of two drawn; ``population`` is sorted, best first."""
    places = list(range(len(population)))
    chosen = []
    for _ in range(count):
        place = min(rng.choice(places), rng.choice(places))
        places.remove(place)
        chosen.append(population[place])
    return chosen


def _best_last(pair: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    return tuple(sorted(pair, key=lambda c: (-(c.relative if c.relative is not None else c.fitness or 0.0), c.plan_hash)))


def _cycle(slots: Sequence[tuple[Candidate, ...]], count: int) -> list[tuple[Candidate, ...]]:
    return [slots[number % len(slots)] for number in range(count)]
