"""The search: probes, initial plans, generations of children with staged survival, a final on unseen tokens.

Every decision follows from the config, the seed, recorded LLM replies and evaluation results. Running it again over a recorder that
holds them repeats it exactly and costs nothing.

    probes -> landscape -> initial plans -> [ survey? -> children -> stages -> landscape, bandit ]* -> final

A *survey* tells what the next levels of every block would do around the leader; from it the landscape's model knows where to go
next. The LLM is asked for the next generation's children while the workers score this one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from selfpruner.config import SearchConfig
from selfpruner.errors import ConfigError, SelfprunerError
from selfpruner.evolution.breeding import Breeder
from selfpruner.evolution.evaluator import Evaluator, Fitness
from selfpruner.evolution.front import front_tokens
from selfpruner.evolution.generation_probe import probe_writing
from selfpruner.evolution.outcome import Outcome
from selfpruner.evolution.state import Mark, State, standing
from selfpruner.evolution.survey import Surveyor
from selfpruner.evolution.windows import Windows
from selfpruner.operators import OPERATORS, Offspring
from selfpruner.operators.closed_form import Ramp, Uniform
from selfpruner.planning.landscape import Landscape, Reference, spearman
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.proposers.in_flight import in_flight
from selfpruner.proposers.llm_calls import LlmChannel
from selfpruner.records import Candidate, Progress, Recorder, Window


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
        signals: Signals | None = None,
    ) -> None:
        self.config = config
        self.space = space
        self.evaluator = evaluator
        self.recorder = recorder
        self.windows = windows
        self.channel = channel
        self.state = State(config, space, signals or Signals())
        self.uniform = space.project([space.rate] * space.layers)
        self.stages = evaluator.stages
        self.surveyor = Surveyor(space, evaluator, windows, recorder, config.survey_step)
        self.breeder = Breeder(config, self.state, self.uniform, channel, self.stages)
        self.generation = 0
        self._gains: list[float] = []
        self._correlations: dict[int, float] = {}
        self._thinking: dict[str, float] = defaultdict(float)

    async def run(self) -> Outcome:
        """Probe, search, decide. Raises SelfprunerError when no plan at all could be scored."""
        if "probes" in self.config.needs or len(self.config.objective) > 1:
            await self._probe()
        self._report("searching", "making the first plans")
        children = await self.breeder.initial()
        self._check_budget(len(children))
        stopped = None
        while stopped is None:
            self._count_thinking()
            pending = [self._candidate(child) for child in children]
            async with in_flight(self.breeder.ahead(self.generation + 1, pending)) as asked:
                await self._generation(pending)
                with self.stages.at("thinking"):
                    arrived = await asked
            stopped = self._stop()
            if stopped is None:
                self.generation += 1
                await self._survey()
                self._report("searching", f"generation {self.generation}: making plans")
                children = await self.breeder.children(self.generation, arrived)
        return await self._final(stopped)

    # -- probes --------------------------------------------------------------------------------------------------------
    async def _probe(self) -> None:
        """The sensitivity of every block of the dense model: where the landscape starts."""
        self._report("probing", f"measuring the sensitivity of {len(self.space.blocks)} blocks")
        state = self.state
        with self.stages.at("probes"):
            state.probe_levels, state.sensitivities = await self.surveyor.probe()
        state.landscape = Landscape(self.space, state.sensitivities, state.probe_levels)

    async def _survey(self) -> None:
        """Show the landscape what every block's next levels would do, where that is due and tokens are left for it."""
        leader, landscape = self.state.leader, self.state.landscape
        askers = [name for name in self.config.operators if "surveys" in OPERATORS[name].needs]
        wanted = askers and self.surveyor.made < self.config.surveys and self.config.fitness == "kl"
        if leader is None or landscape is None or not wanted:
            return
        if not self._affordable(self.surveyor.tokens + self._generation_tokens()):
            return
        offset = self.surveyor.place(landscape)
        if offset is None:
            return
        self._report("probing", f"generation {self.generation}: looking around the best plan")
        with self.stages.at("surveys"):
            seconds = await self.surveyor.around(offset, Plan(leader.levels), landscape, self.generation)
        for name in askers:
            self._thinking[name] += seconds / len(askers)
        landscape.fit(self.generation)

    # -- scoring plans -------------------------------------------------------------------------------------------------
    def _candidate(self, child: Offspring) -> Candidate:
        rates = tuple(round(rate, 6) for rate in self.space.rates(child.plan))
        candidate = Candidate(
            child.plan.hash, child.plan.levels, rates, self.generation, child.operator, child.parents, informed_by=child.informed_by
        )
        leader, landscape = self.state.leader, self.state.landscape
        if landscape is not None and leader is not None and leader.fitness and leader.relative is not None:
            change = landscape.change(child.plan, Plan(leader.levels)) / leader.fitness
            candidate.predicted = round(leader.relative * (1 + change), 6)
        if child.operator in self.breeder.bandit.arms:
            candidate.credit = round(self.breeder.bandit.value(child.operator), 9)
        self.state.candidates[candidate.plan_hash] = candidate
        self.state.made[child.operator] += 1
        return candidate

    async def _generation(self, fresh: Sequence[Candidate]) -> None:
        """Score children beside leader and uniform plan, stage by stage on the same fresh tokens; the best are kept."""
        number, state = self.generation, self.state
        self.recorder.save_candidates(fresh)
        stages = self.windows.generation(number)
        leader = state.leader
        before = leader.relative if leader is not None else None
        standing_ = self._standing()
        field_, uniform, last = list(fresh), math.nan, 0
        seconds: dict[str, float] = defaultdict(float)
        for stage, keep in enumerate(stage.keep for stage in self.config.stages):
            self._report("searching", f"generation {number}, stage {stage + 1}: {len(field_)} new plans")
            used = stages[: stage + 1]
            scores = await self._scores([*field_, *standing_], field_, keep, used)
            uniform = scores[self.uniform.hash].value(self.config.fitness)
            mark = None if leader is None else Mark(before, scores[leader.plan_hash].value(self.config.fitness))
            for candidate in (*field_, *standing_):
                state.judge(candidate, scores[candidate.plan_hash], uniform, mark, used)
            for candidate in field_:
                seconds[candidate.operator] += scores[candidate.plan_hash].seconds
            self._learn(field_, leader, scores, used, first=stage == 0)
            last = sum(len(window.sequences) for window in used) * self.windows.length
            field_ = sorted((c for c in field_ if c.status == "evaluated" and not c.rejected), key=standing)[:keep]
        gains = self._gains_of(field_, before)
        self._credit(fresh, before)
        for candidate in field_:
            state.admit(candidate, uniform, last)
        for candidate in standing_:
            state.pool(candidate, uniform, last)
        entrants = [c for c in field_ if self._may_stay(c)]
        ranked = state.ranked([*entrants, *state.population])
        touched = {c.plan_hash: c for c in (*fresh, *state.population)}
        state.population = ranked[: self.config.population]
        for candidate in touched.values():
            candidate.survived = any(candidate is member for member in state.population)
        self.recorder.save_candidates(list(touched.values()))
        if not state.population:
            raise SelfprunerError(
                "No plan of the first generation could be scored; the candidates' reasons say why.", code="no_feasible_plan"
            )
        best = state.population[0]
        state.stale = state.stale + 1 if best is leader else 0
        self._gains.append(max(gains.values(), default=0.0) if best is not leader else 0.0)
        self._reward(fresh, gains, seconds)
        self._tell(fresh, best)

    def _standing(self) -> list[Candidate]:
        """Whom children are scored beside: the leader, and the uniform plan, whose fitness is the measure of all others. In the
        paper's loop the whole population."""
        return list(self.state.population if self.breeder.llm_only else self.state.population[:1])

    async def _scores(
        self, plans: Sequence[Candidate], contenders: Sequence[Candidate], keep: int, windows: Sequence[Window]
    ) -> dict[str, Fitness]:
        race = {candidate.plan_hash for candidate in contenders} - {self.uniform.hash} if self.config.early_rejection else set()
        everything = [self.uniform, *(Plan(candidate.levels) for candidate in plans)]
        with self.stages.at("scoring"):
            return await self.evaluator.score(everything, windows, contenders=race, keep=keep)

    def _learn(
        self,
        children: Sequence[Candidate],
        leader: Candidate | None,
        scores: Mapping[str, Fitness],
        used: Sequence[Window],
        *,
        first: bool,
    ) -> None:
        """Show the landscape what changed between the leader and its children on the same tokens; with the first stage, which has
        them all, also how well it had foreseen that."""
        landscape = self.state.landscape
        if landscape is None or leader is None or self.config.fitness != "kl":
            return
        base, here = scores[leader.plan_hash], Plan(leader.levels)
        scored = [c for c in children if c.status == "evaluated" and not c.rejected]
        known = [c for c in scored if c.predicted is not None]
        if first and len(known) >= 4:
            foreseen = spearman([c.predicted or 0.0 for c in known], [scores[c.plan_hash].kl for c in known])
            if foreseen is not None:
                self._correlations[self.generation] = round(foreseen, 3)
        name = "+".join(window.name for window in used)
        reference = Reference(here, base.kl, name, base.tokens, self.generation)
        for candidate in scored:
            landscape.observe(Plan(candidate.levels), scores[candidate.plan_hash].kl - base.kl, reference)
        landscape.fit(self.generation)

    def _may_stay(self, candidate: Candidate) -> bool:
        """The uniform plan is a reference for all, and a member of the population only where the config starts with it."""
        return candidate.plan_hash != self.uniform.hash or Uniform.name in self.config.initial

    def _credit(self, fresh: Sequence[Candidate], lowest: float | None) -> None:
        """Who improved on the best so far, in the order the plans were made."""
        low = math.inf if lowest is None else lowest
        for candidate in fresh:
            if candidate.status == "evaluated" and candidate.relative is not None and candidate.relative < low:
                self.state.improved[candidate.operator] += 1
                low = candidate.relative

    # -- the bandit's books --------------------------------------------------------------------------------------------
    @staticmethod
    def _gains_of(finalists: Sequence[Candidate], before: float | None) -> dict[str, float]:
        """Per operator the relative improvement over the leader by the best child that reached the last stage."""
        gains: dict[str, float] = {}
        if not before:
            return gains
        for candidate in finalists:
            if candidate.relative is not None:
                gain = 1 - candidate.relative / before
                gains[candidate.operator] = max(gains.get(candidate.operator, 0.0), gain)
        return gains

    def _count_thinking(self) -> None:
        """What the LLM's answers for this generation cost: all of their seconds where it shares the worker, else what was not
        hidden behind the scoring."""
        if self.channel is None:
            return
        arms = [name for name in self.breeder.bandit.arms if "llm" in OPERATORS[name].needs]
        for name, seconds in self.channel.take_seconds().items():
            # Selecting parents and reflecting serve all of them.
            for arm in [name] if name in arms else arms:
                self._thinking[arm] += seconds if name in arms else seconds / len(arms)

    def _reward(self, fresh: Sequence[Candidate], gains: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        thinking = dict(self._thinking)
        self._thinking.clear()
        if self.channel is not None and self.channel.overlaps:
            hidden = sum(seconds.values())
            thinking = {n: max(0.0, s - hidden) if "llm" in OPERATORS[n].needs else s for n, s in thinking.items()}
        self.breeder.bandit.reward(gains, seconds, thinking, Counter(c.operator for c in fresh))

    def _check_budget(self, children: int) -> None:
        """Raise ConfigError where the budget does not even pay for the initial plans and the final."""
        budget = self.config.budget_tokens
        stages = [self.windows.count(stage.tokens) * self.windows.length for stage in self.config.stages]
        final = len(self.windows.final.sequences) * self.windows.length
        least = self.evaluator.tokens + (children + 1) * stages[-1] + final * min(self.config.population + 2, children + 1)
        if budget is not None and budget < least:
            raise ConfigError(
                f"budget_tokens is {budget:,}; probes, initial plans and the final alone take up to {least:,}. Raise it, or lower "
                "probe_tokens, stages or final_tokens.",
                param="budget_tokens",
            )

    # -- stopping ------------------------------------------------------------------------------------------------------
    def _affordable(self, tokens: int) -> bool:
        """Whether ``tokens`` more leave enough of the budget for the final."""
        budget = self.config.budget_tokens
        return budget is None or self.evaluator.tokens + tokens + self._final_tokens() <= budget

    def _final_tokens(self) -> int:
        entrants = len({c.plan_hash for c in self.state.population} | {self.uniform.hash}) + 1
        return len(self.windows.final.sequences) * self.windows.length * entrants + front_tokens(self.config, self.windows)

    def _generation_tokens(self) -> int:
        """The most a generation can cost."""
        total, field_, before = 0, self.breeder.offspring, 0
        beside = (len(self.state.population) if self.breeder.llm_only else 1) + 1
        for stage in self.config.stages:
            total += (self.windows.count(stage.tokens) - self.windows.count(before)) * self.windows.length * (field_ + beside)
            field_, before = stage.keep, stage.tokens
        return total

    def _stop(self) -> str | None:
        """Why the generations end here, or None."""
        config = self.config
        if self.generation >= config.generations:
            return f"all {config.generations} generations were made"
        if not self._affordable(self._generation_tokens()):
            return f"another generation would pass the budget of {config.budget_tokens:,} tokens"
        if config.patience and self.state.stale >= config.patience:
            return f"no better plan in {self.state.stale} generations"
        if config.patience and len(self._gains) > config.patience:
            recent = self._gains[-config.patience :]
            if sum(recent) / len(recent) < config.least_gain:
                return f"the last {len(recent)} generations gained {100 * sum(recent):.2f} % together"
        return None

    # -- deciding ------------------------------------------------------------------------------------------------------
    async def _final(self, stopped: str) -> Outcome:
        """Re-score the population, the best ramp and the uniform plan on tokens that no stage saw; the best of them wins, unless
        it writes badly."""
        number, state = self.generation, self.state
        # Generations that the budget did not allow for are not saved.
        each = self._generation_tokens()
        saved = (self.config.generations - number) * each if self._affordable(each) else 0
        if number < self.config.generations:
            self.recorder.event(
                "stopped",
                "search.stopped",
                f"Stopped after generation {number} of {self.config.generations}: {stopped}.",
                data={
                    "generation": number,
                    "reason": stopped,
                    "tokens_spent": self.evaluator.tokens,
                    "tokens_saved": saved,
                },
            )
        self._report("searching", "final: re-scoring the best plans on unseen tokens")
        ramps = [c for c in state.context(number).history if c.operator == Ramp.name]
        ramp = ramps[0] if ramps else None
        uniform = state.candidates[self.uniform.hash]
        entrants = {c.plan_hash: c for c in (*state.population, *([ramp] if ramp else []), uniform)}
        window = [self.windows.final]
        with self.stages.at("final"):
            scores = await self.evaluator.score([Plan(c.levels) for c in entrants.values()], window)
        reference = scores[self.uniform.hash].value(self.config.fitness)
        for candidate in entrants.values():
            state.judge(candidate, scores[candidate.plan_hash], reference, None, window)
        self.recorder.save_candidates(list(entrants.values()))
        finalists = sorted((c for c in entrants.values() if c.status == "evaluated"), key=standing)
        if not finalists:
            raise SelfprunerError("No plan could be scored on the final tokens.", code="no_feasible_plan")
        best, repetition, not_written = finalists[0], dict[str, float](), None
        if self.config.generation_probe:
            self._report("searching", "letting the best plans write", best)
            with self.stages.at("writing"):
                best, repetition, not_written = await probe_writing(
                    finalists, scores, self.evaluator, self.recorder, self.windows.final
                )
        foreseen = self._correlations.values()
        correlation = sum(foreseen) / len(foreseen) if foreseen else None
        self.recorder.event(
            "final",
            "search.finished",
            f"Best plan {best.plan_hash} by {best.operator}: {self.config.fitness} {best.fitness:.4f} on unseen tokens, "
            f"{100 * (best.relative or 1):.1f} % of uniform.",
            data={
                "best": best.plan_hash,
                "fitness": best.fitness,
                "relative": best.relative,
                "operator": best.operator,
                "rank_correlation": correlation,
            },
        )
        self._report("searching", "search finished", best)
        return Outcome(
            best,
            uniform,
            ramp,
            finalists,
            number,
            dict(state.made),
            dict(state.improved),
            stopped,
            self.evaluator.tokens,
            correlation,
            saved,
            repetition,
            not_written,
        )

    # -- telling -------------------------------------------------------------------------------------------------------
    def _tell(self, fresh: Sequence[Candidate], best: Candidate) -> None:
        number = self.generation
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
                "tokens": self.evaluator.tokens,
                "rank_correlation": self._correlations.get(number),
                "bandit": {name: round(1e4 * self.breeder.bandit.value(name), 3) for name in self.breeder.bandit.arms},
            },
        )
        self._report("searching", f"generation {number} done")
        self.recorder.save_stages(self.stages.rows())

    def _report(self, stage: str, message: str, best: Candidate | None = None) -> None:
        best = best or self.state.leader
        self.recorder.progress(
            Progress(
                stage=stage,
                generation=self.generation,
                generations=self.config.generations,
                evaluations=self.evaluator.evaluations,
                plans=len(self.evaluator.plans),
                best_fitness=best.fitness if best else None,
                best_relative=best.relative if best else None,
                best_plan=best.plan_hash if best else None,
                message=message,
                data={"operators": dict(self.state.made), "improved": dict(self.state.improved), "tokens": self.evaluator.tokens},
            )
        )
