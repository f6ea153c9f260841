"""The search: initial plans, generations of offspring, staged survival, a final on unseen tokens.

Everything it decides follows from the config, the seed, recorded LLM replies and evaluation results, so running it again over a
recorder that holds them repeats it exactly and costs nothing. The uniform plan is scored in every window: a candidate's
``relative`` fitness is its fitness over the uniform plan's on the same tokens, which can be compared across generations.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfpruner.config import SearchConfig
from selfpruner.errors import ProposerError, SelfprunerError
from selfpruner.names import LLM_OPERATORS
from selfpruner.operators import CLASSICAL, CROSSOVERS, MUTATIONS, Context, Offspring, Operator, ParentSelection, Rejected
from selfpruner.proposers.channel import LlmChannel
from selfpruner.search.evaluator import Evaluator, Fitness
from selfpruner.search.records import Candidate, Progress, Recorder, Window
from selfpruner.search.windows import Windows
from selfpruner.space import Plan, SearchSpace

# Classical operators draw again when their children are known already; this many times before a slot stays empty.
REDRAWS = 20


@dataclass(frozen=True)
class Outcome:
    """What a search found. ``best`` won the final; ``finalists`` are sorted by their fitness there, best first."""

    best: Candidate
    uniform: Candidate
    ramp: Candidate | None
    finalists: Sequence[Candidate]
    generations: int
    made: Mapping[str, int]
    improved: Mapping[str, int]


@dataclass
class _State:
    candidates: dict[str, Candidate] = field(default_factory=dict)
    population: list[Candidate] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    sensitivities: list[float] = field(default_factory=list)
    probe_levels: list[int] = field(default_factory=list)
    stale: int = 0
    made: Counter[str] = field(default_factory=Counter)
    improved: Counter[str] = field(default_factory=Counter)
    lowest: float = float("inf")


class Search:
    """One job's search. ``channel`` is None when no operator of the config needs an LLM; ``signals`` come from ``prepare``."""

    def __init__(
        self,
        config: SearchConfig,
        space: SearchSpace,
        evaluator: Evaluator,
        recorder: Recorder,
        windows: Windows,
        channel: LlmChannel | None,
        signals: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.space = space
        self.evaluator = evaluator
        self.recorder = recorder
        self.windows = windows
        self.channel = channel
        self.signals = signals or {}
        self.state = _State()
        self.uniform = space.project([space.rate] * space.layers)
        self._llm: dict[str, Operator] = {}
        self._select: ParentSelection | None = None
        if channel is not None:
            from selfpruner.operators import llm

            self._llm = {name: llm.OPERATORS[name](channel) for name in LLM_OPERATORS if name != "select"}  # type: ignore[misc]
            self._select = llm.Select(channel) if "select" in config.operators else None

    async def run(self) -> Outcome:
        """Probe, search, decide. Raises SelfprunerError when no plan at all could be scored."""
        if self._needs_probes():
            await self._probe()
        await self._generation(0, await self._initial())
        for number in range(1, self.config.generations + 1):
            await self._generation(number, await self._offspring(number))
        return await self._final()

    # -- probes --------------------------------------------------------------------------------------------------------
    def _needs_probes(self) -> bool:
        return "sensitivity" in self.config.initial or self.config.uses_llm

    async def _probe(self) -> None:
        """KL when only one block is at a middle level, block by block, in one walk."""
        self._report("probing", 0, f"measuring the sensitivity of {len(self.space.blocks)} blocks")
        levels = [_probe_level(self.space, index) for index in range(len(self.space.blocks))]
        plans = [Plan(tuple(level if other == index else 0 for other in range(len(levels)))) for index, level in enumerate(levels)]
        scores = await self.evaluator.score(plans, [self.windows.probe])
        values = [scores[plan.hash].kl for plan in plans]
        self.state.sensitivities = [max(value, 0.0) if math.isfinite(value) else 0.0 for value in values]
        self.state.probe_levels = levels
        self.evaluator.plans.clear()  # a probe is no candidate and does not count as a plan evaluated
        self.recorder.event(
            "probes",
            "search.probed",
            f"Sensitivity of {len(levels)} blocks measured on {len(self.windows.probe.sequences) * self.windows.length} tokens.",
            data={"levels": levels, "kl": [round(value, 6) for value in self.state.sensitivities]},
        )

    # -- making plans --------------------------------------------------------------------------------------------------
    def _context(self, generation: int, parents: Sequence[tuple[Candidate, Candidate]] = ()) -> Context:
        history = sorted((c for c in self.state.candidates.values() if c.status == "evaluated"), key=_standing)
        return Context(
            space=self.space,
            generation=generation,
            generations=self.config.generations,
            population=tuple(self.state.population),
            history=tuple(history),
            sensitivities=tuple(self.state.sensitivities),
            probe_levels=tuple(self.state.probe_levels),
            seen=frozenset(self.state.candidates),
            rejected=tuple(self.state.rejected[-8:]),
            parents=tuple(parents),
            model_name=self.config.model,
            metric=self.config.fitness,
            stale_generations=self.state.stale,
            signals=self.signals,
        )

    def _rng(self, generation: int, name: str) -> random.Random:
        return random.Random(f"{self.config.seed}:{generation}:{name}")

    async def _initial(self) -> list[Offspring]:
        """Plans of the closed-form operators, then the LLM's until the population is full (three quarters more with both)."""
        self._report("searching", 0, "initial plans")
        found: dict[str, Offspring] = {self.uniform.hash: Offspring(self.uniform, "uniform")}
        for name in self.config.initial:
            if name in LLM_OPERATORS:
                only = all(other in LLM_OPERATORS for other in self.config.initial)
                want = self.config.population if only else max(2, self.config.population // 2)
                await self._ask(self._llm[name], 0, want, found)
            else:
                await self._draw(CLASSICAL[name](), 0, self.config.population if name == "random" else 8, found)
        short = self.config.population - len(found)
        if short > 0 and self._llm_only():
            # An LLM that is down, or repeats itself, must not leave the population empty.
            await self._draw(CLASSICAL["random"](), 0, short, found)
        return list(found.values())

    async def _offspring(self, generation: int) -> list[Offspring]:
        """Children by crossover and by mutation. Where LLM and classical operators share a kind they lead in turn: the LLM in odd
        generations, the classical ones in even generations; whoever leads is asked for all, the others fill what is missing."""
        if self.channel is not None:
            self.channel.new_generation(generation)
        found: dict[str, Offspring] = {}
        parents = await self._parents(generation)
        for kind, count in ((CROSSOVERS, self.config.crossover_offspring), (MUTATIONS, self.config.mutation_offspring)):
            mine = [name for name in self.config.operators if name in kind]
            ready = [n for n in mine if n in LLM_OPERATORS], [n for n in mine if n not in LLM_OPERATORS]
            in_turn = [*ready[0], *ready[1]] if generation % 2 or not ready[1] else [*ready[1], *ready[0]]
            want = len(found) + count
            for name in in_turn:
                if len(found) >= want:
                    break
                if name in LLM_OPERATORS:
                    await self._ask(self._llm[name], generation, want - len(found), found, parents)
                else:
                    await self._draw(CLASSICAL[name](), generation, want - len(found), found, parents)
            if len(found) < want and not ready[1] and self.channel is not None and not self.channel.open:
                await self._draw(CLASSICAL["level_switch"](), generation, want - len(found), found)
        return list(found.values())

    async def _parents(self, generation: int) -> list[tuple[Candidate, Candidate]]:
        """The pairs that the LLM selects, in the generations it leads; none where it is left out or not asked."""
        classical = any(name not in LLM_OPERATORS for name in self.config.operators)
        if self._select is None or (classical and generation % 2 == 0):
            return []
        try:
            return await self._select.select(
                self._context(generation), max(self.config.crossover_offspring, 1), self._rng(generation, "select")
            )
        except ProposerError as error:
            self._note("select", error)
            return []

    async def _ask(
        self,
        operator: Operator,
        generation: int,
        want: int,
        found: dict[str, Offspring],
        parents: Sequence[tuple[Candidate, Candidate]] = (),
    ) -> None:
        """Ask an LLM operator for ``want`` new plans. Beside classical operators, which are free, it answers one question;
        alone it is asked on while it gives new plans and its channel is open."""
        assert self.channel is not None
        if not self._llm_only():
            want = min(want, self.channel.settings.plans)
        start = len(found)
        rng = self._rng(generation, operator.name)
        while len(found) - start < want and self.channel.open:
            before = len(found)
            context = self._context(generation, parents)
            try:
                children = await operator.propose(context, want - (len(found) - start), rng)
            except ProposerError as error:
                self._note(operator.name, error)
                if not self._llm_only():
                    return  # the classical operators fill in at once
                continue  # nobody else would: three failures in a row close the channel
            self._add(children, found)
            if len(found) == before or not self._llm_only():
                return

    async def _draw(
        self,
        operator: Operator,
        generation: int,
        want: int,
        found: dict[str, Offspring],
        parents: Sequence[tuple[Candidate, Candidate]] = (),
    ) -> None:
        start = len(found)
        rng = self._rng(generation, operator.name)
        for _ in range(REDRAWS):
            missing = want - (len(found) - start)
            if missing <= 0:
                return
            children = await operator.propose(self._context(generation, parents), missing, rng)
            before = len(found)
            self._add(children, found)
            if not children or (generation == 0 and len(found) == before):
                return

    def _add(self, children: Sequence[Offspring], found: dict[str, Offspring]) -> None:
        for child in children:
            if child.plan.hash not in self.state.candidates and self.space.meets_budget(child.plan):
                found.setdefault(child.plan.hash, child)

    def _llm_only(self) -> bool:
        names = [*self.config.initial, *self.config.operators]
        return all(name in LLM_OPERATORS for name in names)

    def _note(self, operator: str, error: ProposerError) -> None:
        """Remember for the next prompt what was wrong with a reply; what went wrong on the way is no lesson for the LLM."""
        if error.code in ("invalid", "not_json", "no_new_plan"):
            self.state.rejected.append(Rejected(operator, f"{error.code}: {error.message[:160]}"))

    # -- scoring plans -------------------------------------------------------------------------------------------------
    async def _generation(self, number: int, children: Sequence[Offspring]) -> None:
        """Score children and population stage by stage on the same fresh tokens; the best become the population."""
        fresh = [self._candidate(child, number) for child in children]
        self.recorder.save_candidates(fresh)
        stages = self.windows.generation(number)
        field_ = list(fresh)
        touched = {c.plan_hash: c for c in (*fresh, *self.state.population)}
        for stage, keep in enumerate(stage.keep for stage in self.config.stages):
            self._report("searching", number, f"generation {number}, stage {stage + 1}: {len(field_)} new plans")
            used = stages[: stage + 1]
            standing = [*field_, *self.state.population]
            plans = [self.uniform, *(Plan(c.levels) for c in standing)]
            scores = await self.evaluator.score(plans, used)
            reference = scores[self.uniform.hash].value(self.config.fitness)
            for candidate in standing:
                self._judge(candidate, scores[candidate.plan_hash], reference, used)
            field_ = sorted((c for c in field_ if c.status == "evaluated"), key=_standing)[:keep]
        self._credit(fresh)
        leader = self.state.population[0].plan_hash if self.state.population else None
        entrants = [c for c in field_ if self._may_stay(c)]
        ranked = sorted((c for c in (*entrants, *self.state.population) if c.status == "evaluated"), key=_standing)
        self.state.population = ranked[: self.config.population]
        for candidate in touched.values():
            candidate.survived = any(candidate is member for member in self.state.population)
        self.recorder.save_candidates(list(touched.values()))
        if not self.state.population:
            raise SelfprunerError(
                "No plan of the first generation could be scored; the candidates' reasons say why.", code="no_feasible_plan"
            )
        best = self.state.population[0]
        self.state.stale = self.state.stale + 1 if best.plan_hash == leader else 0
        self.state.lowest = best.relative if best.relative is not None else self.state.lowest
        self.recorder.event(
            f"generation-{number}",
            "search.generation",
            f"Generation {number}: best {self.config.fitness} {best.fitness:.4f}, {100 * (best.relative or 1):.1f} % of uniform, "
            f"by {best.operator}.",
            data={
                "generation": number,
                "best": best.plan_hash,
                "fitness": best.fitness,
                "relative": best.relative,
                "operator": best.operator,
                "plans": dict(Counter(c.operator for c in fresh)),
                "population": [c.plan_hash for c in self.state.population],
            },
        )
        self._report("searching", number, f"generation {number} done")

    def _candidate(self, child: Offspring, generation: int) -> Candidate:
        rates = tuple(round(rate, 6) for rate in self.space.rates(child.plan))
        candidate = Candidate(child.plan.hash, child.plan.levels, rates, generation, child.operator, child.parents)
        self.state.candidates[candidate.plan_hash] = candidate
        self.state.made[child.operator] += 1
        return candidate

    def _judge(self, candidate: Candidate, fitness: Fitness, reference: float, windows: Sequence[Window]) -> None:
        value = fitness.value(self.config.fitness)
        candidate.window = "+".join(window.name for window in windows)
        candidate.tokens = fitness.tokens
        if fitness.reason is not None or not math.isfinite(value):
            candidate.status = "failed" if (fitness.reason or "").startswith("out of memory") else "infeasible"
            candidate.reason = fitness.reason or "the fitness is not a number"
            candidate.fitness = candidate.relative = None
            return
        candidate.status = "evaluated"
        candidate.fitness = value
        candidate.relative = value / reference if reference > 0 else None

    def _may_stay(self, candidate: Candidate) -> bool:
        """The uniform plan is a reference for all, and a member of the population only where the config starts with it."""
        return candidate.plan_hash != self.uniform.hash or "uniform" in self.config.initial

    def _credit(self, fresh: Sequence[Candidate]) -> None:
        """Who improved on the best so far, in the order the plans were made."""
        for candidate in fresh:
            if candidate.status == "evaluated" and candidate.relative is not None and candidate.relative < self.state.lowest:
                self.state.improved[candidate.operator] += 1
                self.state.lowest = candidate.relative

    # -- deciding ------------------------------------------------------------------------------------------------------
    async def _final(self) -> Outcome:
        """Re-score the population, the best ramp and the uniform plan on tokens that no stage saw; the best of them wins."""
        number = self.config.generations
        self._report("searching", number, "final: re-scoring the best plans on unseen tokens")
        by_operator = [c for c in self._context(number).history if c.operator == "ramp"]
        ramp = by_operator[0] if by_operator else None
        uniform = self.state.candidates[self.uniform.hash]
        entrants = {c.plan_hash: c for c in (*self.state.population, *([ramp] if ramp else []), uniform)}
        window = [self.windows.final]
        scores = await self.evaluator.score([Plan(c.levels) for c in entrants.values()], window)
        reference = scores[self.uniform.hash].value(self.config.fitness)
        for candidate in entrants.values():
            self._judge(candidate, scores[candidate.plan_hash], reference, window)
        self.recorder.save_candidates(list(entrants.values()))
        finalists = sorted((c for c in entrants.values() if c.status == "evaluated"), key=_standing)
        if not finalists:
            raise SelfprunerError("No plan could be scored on the final tokens.", code="no_feasible_plan")
        best = finalists[0]
        self.recorder.event(
            "final",
            "search.finished",
            f"Best plan {best.plan_hash} by {best.operator}: {self.config.fitness} {best.fitness:.4f} on unseen tokens, "
            f"{100 * (best.relative or 1):.1f} % of uniform.",
            data={"best": best.plan_hash, "fitness": best.fitness, "relative": best.relative, "operator": best.operator},
        )
        self._report("searching", number, "search finished", best)
        return Outcome(best, uniform, ramp, finalists, number, dict(self.state.made), dict(self.state.improved))

    def _report(self, stage: str, generation: int, message: str, best: Candidate | None = None) -> None:
        best = best or (self.state.population[0] if self.state.population else None)
        self.recorder.progress(
            Progress(
                stage=stage,
                generation=generation,
                generations=self.config.generations,
                evaluations=self.evaluator.evaluations,
                plans=len(self.evaluator.plans),
                best_fitness=best.fitness if best else None,
                best_relative=best.relative if best else None,
                best_plan=best.plan_hash if best else None,
                message=message,
                data={"operators": dict(self.state.made), "improved": dict(self.state.improved)},
            )
        )


def _standing(candidate: Candidate) -> tuple[float, str]:
    """Sort key: relative fitness, which exists for every evaluated candidate; equal ones by hash, so that order is stable."""
    value = candidate.relative if candidate.relative is not None else candidate.fitness
    return (value if value is not None else float("inf"), candidate.plan_hash)


def _probe_level(space: SearchSpace, block: int) -> int:
    """The level whose rate is nearest to twice the target, at most a half: strong enough to be heard, near what is asked."""
    options = space.blocks[block]
    wanted = min(2 * space.rate, 0.5)
    levels = range(1, len(options.options))
    return min(levels, key=lambda level: (abs(options.rate(level) - wanted), level)) if levels else 0
