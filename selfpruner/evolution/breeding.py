"""Who makes a generation's children, and which of many proposals are worth scoring.

A config that names only LLM operators gets the paper's loop (Self-Pruner, arXiv 2502.14413): parents are selected, then crossed
over, then mutated, one question after the other. In all other configs operators compete: a bandit divides a generation's children
among them, the LLM is asked while workers score the generation before, and the landscape's model picks the most promising
proposals of the cheap operators.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from selfpruner.config import SearchConfig
from selfpruner.errors import ProposerError
from selfpruner.evolution.bandit import Bandit
from selfpruner.evolution.state import NOTES_SHOWN, State
from selfpruner.operators import (
    CLASSICAL,
    OPERATORS,
    Context,
    LlmOperator,
    Offspring,
    Operator,
    ParentSelection,
    Refused,
)
from selfpruner.operators.closed_form import Random, Uniform
from selfpruner.operators.evolution import LevelSwitch
from selfpruner.operators.reflect import Reflect
from selfpruner.planning.space import Plan
from selfpruner.proposers.llm_calls import LlmChannel
from selfpruner.records import Candidate
from selfpruner.stages import Stages

# Classical operators draw again when their children are known already; this many times before a slot stays empty.
REDRAWS = 20
# The LLM reflects on every second generation: lessons change slowly, and a question costs as much as asking for plans.
REFLECT_EVERY = 2
# How many plans of the first population a closed-form operator is asked for that does not draw them.
AT_FIRST = 8
# Who fills what others left empty, in the first population and later.
FIRST_FILLER, FILLER = Random, LevelSwitch


class Breeder:
    """Makes plans for one search. ``channel`` is None when no operator of the config needs an LLM."""

    def __init__(self, config: SearchConfig, state: State, uniform: Plan, channel: LlmChannel | None, stages: Stages) -> None:
        self.config = config
        self.state = state
        self.channel = channel
        self._stages = stages
        self._makers = [name for name in config.operators if issubclass(OPERATORS[name], Operator)]
        self.bandit = Bandit(self._makers)
        self.llm_only = all("llm" in OPERATORS[name].needs for name in (*config.initial, *config.operators))
        self._uniform = uniform
        self._llm: dict[str, Operator] = {}
        self._select: ParentSelection | None = None
        self._reflect: Reflect | None = None
        if channel is not None:
            named = dict.fromkeys((*config.initial, *config.operators))
            asked = [cls(channel) for cls in (OPERATORS[name] for name in named) if issubclass(cls, LlmOperator)]
            self._llm = {operator.name: operator for operator in asked if isinstance(operator, Operator)}
            self._select = next((operator for operator in asked if isinstance(operator, ParentSelection)), None)
            self._reflect = None if self.llm_only else Reflect(channel)

    # -- initial plans -------------------------------------------------------------------------------------------------
    async def initial(self) -> list[Offspring]:
        """Plans of the closed-form operators, then the LLM's until the population is full (half of it more with both)."""
        config = self.config
        offspring: dict[str, Offspring] = {self._uniform.hash: Offspring(self._uniform, Uniform.name)}
        for name in config.initial:
            if name in self._llm:
                only = all(other in self._llm for other in config.initial)
                count = config.population if only else max(2, config.population // 2)
                with self._stages.at("thinking"):
                    await self._ask(self._llm[name], self.state.context(0), count, offspring)
            else:
                await self._draw(CLASSICAL[name], 0, config.population if CLASSICAL[name].endless else AT_FIRST, offspring)
        short = config.population - len(offspring)
        if short > 0 and self.llm_only:
            # An LLM that is down, or repeats itself, must not leave the population empty.
            await self._draw(FIRST_FILLER, 0, short, offspring)
        return list(offspring.values())

    # -- children ------------------------------------------------------------------------------------------------------
    @property
    def offspring(self) -> int:
        return self.config.crossover_offspring + self.config.mutation_offspring

    def shares(self, generation: int) -> dict[str, int]:
        """How many children each operator is to make; even shares where the bandit is switched off."""
        arms = list(self.bandit.arms)
        if not arms:
            return {}
        if self.config.bandit:
            return self.bandit.shares(self.offspring, generation)
        # Whoever gets one more changes from generation to generation.
        turn = generation % len(arms)
        return {name: (self.offspring + (index - turn) % len(arms)) // len(arms) for index, name in enumerate(arms)}

    async def ahead(self, generation: int, pending: Sequence[Candidate]) -> list[Offspring]:
        """The LLM's children for ``generation``, asked for while the one before is scored. None in the paper's loop, and none where
        the LLM lives on the worker that scores."""
        if self.channel is None or self.llm_only or not self.channel.overlaps:
            return []
        return await self._consult(generation, pending)

    async def _consult(self, generation: int, pending: Sequence[Candidate] = ()) -> list[Offspring]:
        """All of a generation's questions to the LLM: lessons now and then, parents, children. Everything is asked of what was
        known at the start, whatever is scored meanwhile."""
        assert self.channel is not None
        self.channel.new_generation(generation)
        known = self.state.context(generation, pending=pending).snapshot()
        wanted = {name: share for name, share in self.shares(generation).items() if name in self._llm and share}
        if not wanted:
            return []
        if self._reflect is not None and generation % REFLECT_EVERY == 0:
            self.state.reflections = await self._reflect.reflect(known, self._rng(generation, "reflect"))
            known = replace(known, reflections=self.state.reflections)
        offspring: dict[str, Offspring] = {}
        if any(self._llm[name].crosses for name in wanted):
            known = replace(known, parents=await self._parents(known))
        for name, share in wanted.items():
            await self._ask(self._llm[name], known, share, offspring)
        return list(offspring.values())

    async def children(self, generation: int, arrived: Sequence[Offspring]) -> list[Offspring]:
        """A generation's children: those of the LLM that ``arrived``, and the classical operators' for the rest."""
        if self.llm_only:
            with self._stages.at("thinking"):
                return await self._paper(generation)
        offspring: dict[str, Offspring] = {}
        if self.channel is not None and not self.channel.overlaps:
            with self._stages.at("thinking"):
                arrived = await self._consult(generation)
        self._add(arrived, offspring)
        shares = {name: share for name, share in self.shares(generation).items() if name not in self._llm}
        missing, whole = self.offspring - len(offspring), sum(shares.values())
        for name, share in shares.items():
            # What the LLM did not deliver goes to the others in proportion.
            count = -(-missing * share // whole) if whole else 0
            await self._draw(CLASSICAL[name], generation, min(count, self.offspring - len(offspring)), offspring)
        # An operator that finds nothing new leaves its slots to the one that always does.
        await self._draw(FILLER, generation, self.offspring - len(offspring), offspring)
        return list(offspring.values())

    async def _paper(self, generation: int) -> list[Offspring]:
        assert self.channel is not None
        self.channel.new_generation(generation)
        offspring: dict[str, Offspring] = {}
        parents = await self._parents(self.state.context(generation))
        for crosses, count in ((True, self.config.crossover_offspring), (False, self.config.mutation_offspring)):
            want = len(offspring) + count
            for name in self._makers:
                if self._llm[name].crosses == crosses and len(offspring) < want:
                    context = self.state.context(generation, parents)
                    await self._ask(self._llm[name], context, want - len(offspring), offspring)
            if len(offspring) < want and not self.channel.open:
                await self._draw(FILLER, generation, want - len(offspring), offspring)
        return list(offspring.values())

    async def _parents(self, context: Context) -> list[tuple[Candidate, Candidate]]:
        """The pairs that the LLM selects; none where it does not."""
        if self._select is None:
            return []
        rng = self._rng(context.generation, self._select.name)
        try:
            return await self._select.select(context, max(self.config.crossover_offspring, 1), rng)
        except ProposerError as error:
            self._note(self._select.name, error)
            return []

    async def _ask(self, operator: Operator, context: Context, want: int, found: dict[str, Offspring]) -> None:
        """Ask an LLM operator for ``want`` new plans. Beside classical operators, which are free, it answers one question;
        alone it is asked on while it gives new plans and its channel is open."""
        assert self.channel is not None
        if not self.llm_only:
            want = min(want, self.channel.settings.plans)
        start = len(found)
        rng = self._rng(context.generation, operator.name)
        while len(found) - start < want and self.channel.open:
            before = len(found)
            now = replace(context, seen=context.seen | found.keys(), refused=tuple(self.state.refused[-NOTES_SHOWN:]))
            try:
                children = await operator.propose(now, want - (len(found) - start), rng)
            except ProposerError as error:
                self._note(operator.name, error)
                if not self.llm_only:
                    return  # the classical operators fill in at once
                continue  # nobody else would: three failures in a row close the channel
            self._add(children, found)
            if len(found) == before or not self.llm_only:
                return

    async def _draw(self, kind: type[Operator], generation: int, want: int, found: dict[str, Offspring]) -> None:
        """``want`` new plans of a classical operator; the landscape picks them from several times as many."""
        operator = kind()
        start = len(found)
        rng = self._rng(generation, operator.name)
        choosy = generation > 0 and self.state.landscape is not None and operator.picked
        more = self.config.oversample if choosy else 1
        for _ in range(REDRAWS):
            missing = want - (len(found) - start)
            if missing <= 0:
                return
            children = await operator.propose(self.state.context(generation), missing * more, rng)
            new = {child.plan.hash: child for child in children if child.plan.hash not in found}
            ranked = sorted(new.values(), key=self._promise) if choosy else list(new.values())
            before = len(found)
            for child in ranked:
                if len(found) - start < want or not choosy:
                    self._add([child], found)
            if not children or (generation == 0 and len(found) == before):
                return

    def _promise(self, child: Offspring) -> float:
        leader = self.state.leader
        assert self.state.landscape is not None
        return self.state.landscape.change(child.plan, Plan(leader.levels)) if leader is not None else 0.0

    def _add(self, children: Sequence[Offspring], found: dict[str, Offspring]) -> None:
        for child in children:
            if child.plan.hash not in self.state.candidates and self.state.space.meets_budget(child.plan):
                found.setdefault(child.plan.hash, child)

    def _rng(self, generation: int, name: str) -> random.Random:
        return random.Random(f"{self.config.seed}:{generation}:{name}")

    def _note(self, operator: str, error: ProposerError) -> None:
        """Remember for the next prompt what was wrong with a reply; what went wrong on the way is no lesson for the LLM."""
        if error.code in ("invalid", "not_json", "no_new_plan"):
            self.state.refused.append(Refused(operator, f"{error.code}: {error.message[:160]}"))
