"""The four operators of Self-Pruner (arXiv 2502.14413) as questions to an LLM: initialize, select, crossover, mutate.

A reply is data: it is validated, scaled and projected onto the budget, and compared with the known plans. Plans that fail, are
known or hardly differ from a known one are noted for the next prompt; one good plan in a reply is enough. Questions get warmer
the longer the search is stuck, and cool down with the first better plan.

A context may be one generation old, when the question is put while workers score: its ``pending`` plans count as known, and
children carry ``informed_by``. An operator asked by two coroutines at once would mix their notes; ask one after the other.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypedDict

from pydantic import Field, JsonValue

from selfpruner.catalogue import OPERATORS
from selfpruner.errors import BudgetError, ProposerError
from selfpruner.operators import prompt_facts as facts
from selfpruner.operators.base import Context, Offspring, Operator, ParentSelection, Refused
from selfpruner.operators.plan_format import Answer, PlanFormat, Plans, closed
from selfpruner.planning.space import Plan
from selfpruner.proposers.base import CallError
from selfpruner.proposers.llm_calls import LlmChannel
from selfpruner.records import Candidate

HEAT_PER_STALE_GENERATION = 0.1
_NOTES_SHOWN, _NOTES_KEPT = 5, 50
_REPEATED = {"known": "known already", "near": "hardly different from a known one"}
_OFF_TARGET = 5.0  # percentage points of the average rate that are worth a note


class LlmOperator:
    """What all questions have in common: the channel, the facts of a prompt, notes on what was refused."""

    name: ClassVar[str]

    def __init__(self, channel: LlmChannel) -> None:
        self.refused: list[Refused] = []
        self._channel = channel
        self._format: PlanFormat | None = None

    def _format_of(self, context: Context) -> PlanFormat:
        if self._format is None or self._format.space is not context.space:
            self._format = PlanFormat(context.space)
        return self._format

    def _facts(self, context: Context, count: int, example: str) -> dict[str, object]:
        """The variables every template needs; known plans and hints are for those that make plans."""
        plans = self._format_of(context)
        notes = dict.fromkeys(f"{note.operator}: {note.reason}" for note in (*context.refused, *self.refused))
        return {
            "layers": context.space.layers,
            "keys": plans.keys,
            "most": plans.most,
            "steps": plans.steps(),
            "target": f"{plans.target:.3g}",
            "ffn_weight": plans.ffn_weight,
            "count": count,
            "example": example,
            "sensitivities": plans.sensitivities(context.sensitivities, context.probe_levels),
            "score_scale": facts.scale(context),
            "best": facts.best_score(context),
            "stale": context.stale_generations,
            "lessons": facts.lessons(context),
            "hints": [],
            "history": [],
            "refused": list(notes)[-_NOTES_SHOWN:],
        }

    def _note(self, reason: str) -> None:
        self.refused.append(Refused(self.name, reason))
        del self.refused[:-_NOTES_KEPT]

    def _heat(self, context: Context) -> float:
        return HEAT_PER_STALE_GENERATION * context.stale_generations


class ParentGroup(TypedDict):
    """Parents as a prompt shows them: for which ``plans`` they are, and how two of them lie ``apart``."""

    plans: str
    entries: list[dict[str, str]]
    apart: str


class _PlanMaker(LlmOperator, Operator):
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
        variables = self._facts(context, len(slots), self._example(plans, min(len(slots), 2)))
        variables["parents"] = self._parents(context, slots)
        shown = frozenset(parent.plan_hash for parents in slots for parent in parents)
        variables["history"] = facts.known_plans(context, plans, shown, [child.plan.levels for child in made])
        variables |= self._advice(context, plans)
        others = [*context.history, *context.pending]
        known = context.seen | {c.plan_hash for c in others} | {child.plan.hash for child in made}
        levels = [*(c.levels for c in others), *(child.plan.levels for child in made)]
        return await self._channel.ask(
            self.name,
            context.generation,
            variables,
            self._schema(plans, len(slots)),
            lambda reply: self._read(context, reply, slots, known, levels),
            heat=self._heat(context),
        )

    def _read(
        self,
        context: Context,
        reply: Mapping[str, object],
        slots: Sequence[tuple[Candidate, ...]],
        known: frozenset[str],
        levels: Sequence[Sequence[int]],
    ) -> list[Offspring]:
        """The new plans of a reply. ValueError when none fits the format, outcome ``no_new_plan`` when none is new: equal to one
        of ``known``, or nearer than NEAR to one of ``levels``."""
        plans = self._format_of(context)
        answered = Plans.model_validate(reply).plans[: len(slots)]
        children: list[Offspring] = []
        problems: list[str] = []
        repeated = 0
        for number, (answer, parents) in enumerate(zip(answered, slots, strict=False)):
            try:
                plan, average = self._plan(plans, answer, parents)
            except (ValueError, BudgetError) as error:
                problems.append(f"plans.{number}: {error}")
                continue
            if (reason := self._not_new(context, plan, known, [*levels, *(c.plan.levels for c in children)])) is not None:
                repeated += 1
                self._channel.remark(reason, f"plans.{number}: {_REPEATED[reason]}")
                self._note(f"a plan that was {_REPEATED[reason]}{_score_of(context, plan)}")
                continue
            if abs(average - plans.target) > _OFF_TARGET:
                self._note(f"rates of average {average:.0f} were corrected to the target {plans.target:.3g}")
            known |= {plan.hash}
            parents_of = tuple(parent.plan_hash for parent in parents)
            children.append(Offspring(plan, self.name, parents_of, facts.informed_by(context)))
        if children:
            for problem in problems:
                self._channel.remark("unfit", problem)
                self._note(problem)
            return children
        if repeated:
            raise CallError("Every plan of the answer was known already, or hardly differed from a known one.", code="no_new_plan")
        raise ValueError("; ".join(problems[:2]))

    def _not_new(self, context: Context, plan: Plan, known: frozenset[str], levels: Sequence[Sequence[int]]) -> str | None:
        if plan.hash in known:
            return "known"
        near = any(facts.moved(context.space, plan.levels, other) < facts.NEAR for other in levels)
        return "near" if near else None

    def _example(self, plans: PlanFormat, count: int) -> str:
        return plans.example(count)

    def _schema(self, plans: PlanFormat, count: int) -> dict[str, JsonValue]:
        return plans.schema(count)

    def _plan(self, plans: PlanFormat, answer: Mapping[str, object], parents: Sequence[Candidate]) -> tuple[Plan, float]:  # noqa: ARG002
        """The plan within the budget, and the average rate (percent) of what was answered. ValueError says what does not fit."""
        rates = plans.read(answer)
        return plans.space.project(plans.near_target(rates)), plans.average(rates)

    def _advice(self, context: Context, plans: PlanFormat) -> dict[str, object]:
        """What else the prompt says."""
        return {"hints": facts.hints(context, plans)}

    @abstractmethod
    def _slots(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, ...]]:
        """The parents of each plan to ask for."""

    def _parents(self, context: Context, slots: Sequence[tuple[Candidate, ...]]) -> list[ParentGroup]:
        """What the prompt shows of them: each group of parents once, with the numbers of the plans they are for."""
        plans = self._format_of(context)
        numbers: dict[tuple[str, ...], list[int]] = {}
        for number, parents in enumerate(slots, 1):
            numbers.setdefault(tuple(parent.plan_hash for parent in parents), []).append(number)
        by_hash = {parent.plan_hash: parent for parents in slots for parent in parents}
        groups: list[ParentGroup] = []
        for hashes, places in numbers.items():
            group = [by_hash[plan_hash] for plan_hash in hashes]
            groups.append(
                {
                    "plans": f"plan{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}",
                    "entries": [facts.entry(context, plans, parent) for parent in group],
                    "apart": facts.apart(context, plans, *group) if len(group) == 2 else "",
                }
            )
        return groups


class Initialize(_PlanMaker):
    """Plans from target and sensitivities alone."""

    name = "initialize"
    needs = OPERATORS[name].needs

    def _advice(self, context: Context, plans: PlanFormat) -> dict[str, object]:  # noqa: ARG002
        return {"lessons": []}

    def _slots(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, ...]]:  # noqa: ARG002
        return [()] * count

    def _parents(self, context: Context, slots: Sequence[tuple[Candidate, ...]]) -> list[ParentGroup]:  # noqa: ARG002
        return []


class Crossover(_PlanMaker):
    """One plan from two parents."""

    name = "crossover"
    needs = OPERATORS[name].needs
    crosses = True

    def _slots(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, ...]]:
        if context.parents:
            return _cycle([_best_last(pair) for pair in context.parents], count)
        if len(context.population) < 2:
            return []
        return [_best_last(tuple(_tournament(context.population, 2, rng))) for _ in range(count)]


class Mutate(_PlanMaker):
    """One plan from one parent: the answer holds only what changes."""

    name = "mutate"
    needs = OPERATORS[name].needs

    def _example(self, plans: PlanFormat, count: int) -> str:
        return plans.example_of_changes(count)

    def _schema(self, plans: PlanFormat, count: int) -> dict[str, JsonValue]:
        return plans.schema_of_changes(count)

    def _plan(self, plans: PlanFormat, answer: Mapping[str, object], parents: Sequence[Candidate]) -> tuple[Plan, float]:
        changes = plans.changes(answer)
        rates = plans.space.rates(Plan(parents[0].levels))
        average = plans.average([changes.get(index, rate) for index, rate in enumerate(rates)])
        return plans.space.project(plans.balanced(rates, changes)), average

    def _slots(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, ...]]:
        chosen = dict.fromkeys(parent.plan_hash for pair in context.parents for parent in pair)
        if chosen:
            known = {parent.plan_hash: parent for pair in context.parents for parent in pair}
            return _cycle([(known[plan_hash],) for plan_hash in chosen], count)
        return [tuple(_tournament(context.population, 1, rng)) for _ in range(count)] if context.population else []


class Pairs(Answer):
    pairs: list[list[int]] = Field(min_length=1)


class Select(LlmOperator, ParentSelection):
    """The LLM chooses which candidates become parents."""

    name = "select"
    needs = OPERATORS[name].needs

    async def select(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, Candidate]]:
        """At most ``count`` pairs of different candidates of the population. Raises ProposerError when none came back."""
        shown = self._shown(context)
        if len(shown) < 2 or count < 1 or not self._channel.open:
            return []
        # The order tells a model which to prefer; a drawn one leaves only the scores.
        rng.shuffle(shown)
        count = min(count, 4 * self._channel.settings.plans)
        plans = self._format_of(context)
        variables = self._facts(context, count, '{"pairs":[[1,3],[2,3]]}' if count > 1 else '{"pairs":[[1,3]]}')
        variables["candidates"] = [facts.entry(context, plans, candidate) for candidate in shown]
        number: JsonValue = {"type": "integer", "minimum": 1, "maximum": len(shown)}
        pair: JsonValue = {"type": "array", "items": number, "minItems": 2, "maxItems": 2}
        schema = closed({"pairs": {"type": "array", "items": pair, "minItems": count, "maxItems": count}})

        def read(reply: Mapping[str, object]) -> list[tuple[Candidate, Candidate]]:
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
            room -= len(facts.entry(context, self._format_of(context), candidate)["plan"]) + 12
            if room < 0 and len(shown) >= 2:
                break
            shown.append(candidate)
        return shown


def _score_of(context: Context, plan: Plan) -> str:
    known = next((candidate for candidate in context.history if candidate.plan_hash == plan.hash), None)
    return f" (score {facts.score(context, known)})" if known is not None else ""


def _tournament(population: Sequence[Candidate], count: int, rng: random.Random) -> list[Candidate]:
    """``count`` different candidates, each the better of two drawn; ``population`` is sorted, best first."""
    places = list(range(len(population)))
    chosen = []
    for _ in range(count):
        winner = min(rng.choice(places), rng.choice(places))
        places.remove(winner)
        chosen.append(population[winner])
    return chosen


def _best_last(pair: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    return tuple(sorted(pair, key=lambda c: (-(c.relative if c.relative is not None else c.fitness or 0.0), c.plan_hash)))


def _cycle(slots: Sequence[tuple[Candidate, ...]], count: int) -> list[tuple[Candidate, ...]]:
    return [slots[number % len(slots)] for number in range(count)]
