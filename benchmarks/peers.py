"""The methods that are compared: allocations in closed form, the searches of other papers, and this product's own.

Each takes a :class:`~benchmarks.judge.Run` and returns its plan. It may spend ``run.budget`` fitness tokens (plans times tokens,
probes included); closed forms use what they need. Figures of the other searches: their papers, see the constants.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.judge import Run, Settings
from selfpruner.config import SearchConfig
from selfpruner.evolution.loop import Search
from selfpruner.evolution.windows import Windows
from selfpruner.operators import CLASSICAL, Context
from selfpruner.operators.closed_form import Ramp, Random
from selfpruner.operators.evolution import switch
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.proposers import ProposerSettings, create
from selfpruner.proposers.llm_calls import LlmChannel

Method = Callable[[Run], Awaitable[Plan]]

# Random plans are compared on one window of this many tokens, and reported in batches.
RANDOM_TOKENS = 2048
RANDOM_BATCH = 16

# EvoPress (arXiv 2410.14649) in its fast variant: (1 + lambda) with 16 children; a few tokens for all, more for the survivors, and
# the parent beside them in the last stage only. Its second stage has 8,192 tokens in runs of 400 generations; less here, because
# the budgets are a fraction of those, and more generations serve it better.
CHILDREN = 16
STAGES = ((512, 2), (2048, 1))

# The product's searches end with their budget and not before; what writes no fitness tokens is left out.
BUDGETED = {"generations": 10_000, "patience": 0, "generation_probe": False}

# A classical genetic algorithm with the sizes of Self-Pruner's (arXiv 2502.14413).
POPULATION, CROSSED, MUTATED, GENERATIONS = 30, 10, 10, 20
GENETIC_TOKENS = 512  # at the least; more where the budget allows for all 20 generations
MUTATION_SHARE = 0.1


# -- closed forms --------------------------------------------------------------------------------------------------------
async def uniform(run: Run) -> Plan:
    return run.uniform


def closed_form(name: str) -> Method:
    """The one plan of an operator that needs nothing but the worker's signals."""

    async def method(run: Run) -> Plan:
        found = await CLASSICAL[name]().propose(_context(run), 1, run.rng)
        return found[0].plan

    return method


async def ramp(run: Run) -> Plan:
    """ATP's grid of nine slopes; each is scored on a ninth of the budget, or the whole fitness text where that is less."""
    slopes = await Ramp().propose(_context(run), 8, run.rng)
    plans = list(dict.fromkeys([run.uniform, *(child.plan for child in slopes)]))
    sequences = run.fresh(run.budget // len(plans) // run.length * run.length)
    return _best(plans, await run.score(plans, sequences))


# -- searches ------------------------------------------------------------------------------------------------------------
async def random_search(run: Run) -> Plan:
    """The whole budget on random plans, all on the same tokens; the best wins."""
    sequences = run.fresh(RANDOM_TOKENS)
    cost = len(sequences) * run.length
    best, lowest = run.uniform, (await run.score([run.uniform], sequences))[0]
    while (count := min(RANDOM_BATCH, run.left // cost)) > 0:
        plans = [child.plan for child in await Random().propose(_context(run), count, run.rng)]
        scores = await run.score(plans, sequences)
        if min(scores) < lowest:
            best, lowest = _best(plans, scores), min(scores)
            run.note(best)
    return best


async def level_switch(run: Run) -> Plan:
    """EvoPress: children of the best plan by budget-preserving exchanges, staged survivors, fresh tokens every generation."""
    parent = run.uniform
    cost = _generation_cost(run)
    while run.left >= cost:
        field = _children(run.space, parent, run.rng)
        if not field:
            break  # a space this small has no new neighbours
        for stage, (tokens, keep) in enumerate(STAGES):
            if stage == len(STAGES) - 1:
                field = [*field, parent]
            scores = await run.score(field, run.fresh(tokens))
            field = [plan for _, plan in sorted(zip(scores, field, strict=True), key=lambda pair: (pair[0], pair[1].hash))][:keep]
        parent = field[0]
        run.note(parent)
    return parent


def _generation_cost(run: Run) -> int:
    cost, field = 0, CHILDREN
    for stage, (tokens, keep) in enumerate(STAGES):
        cost += (field + (stage == len(STAGES) - 1)) * run.count(tokens) * run.length
        field = keep
    return cost


def _children(space: SearchSpace, parent: Plan, rng: random.Random) -> list[Plan]:
    """Distinct children by 1 to 3 exchanges (the smaller of two draws)."""
    found: dict[Plan, None] = {}
    for _ in range(20 * CHILDREN):
        child = switch(space, parent, rng, min(rng.randint(1, 3), rng.randint(1, 3)))
        if child != parent:
            found.setdefault(child)
        if len(found) == CHILDREN:
            break
    return list(found)


async def genetic(run: Run) -> Plan:
    """Population 30, 10 children by crossover and 10 by mutation, the best 30 survive; one fitness window for all plans."""
    sequences = run.fresh(_genetic_tokens(run.budget) // run.length * run.length)
    cost = len(sequences) * run.length
    children = [child.plan for child in await Random().propose(_context(run), POPULATION, run.rng)]
    scored: dict[Plan, float] = {}
    for _ in range(GENERATIONS + 1):
        children = list(dict.fromkeys(child for child in children if child not in scored))[: run.left // cost]
        if not children:
            break
        scored |= zip(children, await run.score(children, sequences), strict=True)
        population = sorted(scored, key=lambda plan: (scored[plan], plan.hash))[:POPULATION]
        run.note(population[0])
        children = [_crossed(run, population) for _ in range(CROSSED)] + [_mutated(run, population) for _ in range(MUTATED)]
    return run.incumbent


def _genetic_tokens(budget: int) -> int:
    """Tokens per plan: what the budget allows for all generations."""
    return max(GENETIC_TOKENS, budget // (POPULATION + GENERATIONS * (CROSSED + MUTATED)))


def _crossed(run: Run, population: list[Plan]) -> Plan:
    pairs = zip(*(run.space.rates(_winner(run.rng, population)) for _ in range(2)), strict=True)
    return run.space.project([run.rng.choice(pair) for pair in pairs])


def _mutated(run: Run, population: list[Plan]) -> Plan:
    rates, spread = run.space.rates(_winner(run.rng, population)), run.space.rate / 2
    return run.space.project([rate + run.rng.gauss(0, spread) * (run.rng.random() < MUTATION_SHARE) for rate in rates])


def _winner(rng: random.Random, population: list[Plan]) -> Plan:
    """Of two members drawn, the better one."""
    return population[min(rng.randrange(len(population)), rng.randrange(len(population)))]


# -- this product --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Product:
    """A search of the product: ``fields`` of its config, given the budget. ``needs_llm``: it takes the configured proposer.

    With ``first`` its answer is the first plan of that operator, at what had been spent when it was made.
    """

    fields: Callable[[int], Mapping[str, Any]]
    granularity: Literal["layer", "block"] = "block"
    needs_llm: bool = False
    first: str | None = None

    def config(self, settings: Settings, cache: Path, rate: float, seed: int, proposer: str, **more: Any) -> SearchConfig:
        """``more`` wins over the method's own fields."""
        fields = {"granularity": self.granularity, **self.fields(settings.budget), **more, "seed": seed}
        return settings.config(cache, rate, **fields, **({"proposer": proposer} if self.needs_llm else {}))

    def method(self, config: SearchConfig, proposer: ProposerSettings | None) -> Method:
        async def method(run: Run) -> Plan:
            windows = Windows.of(config)
            channel = None
            if "llm" in config.needs and proposer is not None:
                client = create(config.proposer, proposer, pool=run.pool, session=run.session)
                channel = LlmChannel(client, run.recorder, config.limits, proposer, config.seed)
            within = config if self.first else config.model_copy(update={**BUDGETED, "budget_tokens": run.budget})
            outcome = await Search(within, run.space, run.evaluator, run.recorder, windows, channel, run.signals).run()
            if self.first is None:
                return Plan(outcome.best.levels)
            point = run.recorder.first[self.first]
            run.answered_at(point)
            return Plan(point.levels)

        return method


def _self_pruner(budget: int) -> dict[str, Any]:
    """The paper's loop on this comparison's terms: its criterion, compensation and KL as the fitness, like everybody's."""
    return {"preset": "self-pruner", "fitness": "kl", "stages": [{"tokens": _genetic_tokens(budget), "keep": POPULATION}]}


def _sensitivity(budget: int) -> dict[str, Any]:  # noqa: ARG001
    """The search before its first generation."""
    stages = [{"tokens": 256, "keep": 1}]
    return {"initial": ["uniform", "sensitivity"], "generations": 0, "stages": stages, "final_tokens": 256}


PRODUCT = {
    "sensitivity": Product(_sensitivity, first="sensitivity"),
    "self-pruner": Product(_self_pruner, granularity="layer", needs_llm=True),
    "default": Product(lambda _: {"preset": "evolution"}),
    "default+llm": Product(lambda _: {"preset": "default"}, needs_llm=True),
}
PEERS: dict[str, Method] = {
    "uniform": uniform,
    "random": random_search,
    "ramp": ramp,
    "owl": closed_form("owl"),
    "alpha": closed_form("alpha"),
    "flap_global": closed_form("flap_global"),
    "level_switch": level_switch,
    "ga": genetic,
}
METHODS = (*PEERS, *PRODUCT)
# Methods without any randomness: one seed says it all. The probes behind `sensitivity` are on the same windows whatever the seed.
FIXED = ("uniform", "owl", "alpha", "flap_global", "sensitivity")


def _context(run: Run) -> Context:
    return Context(run.space, 0, 0, signals=run.signals)


def _best(plans: list[Plan], scores: list[float]) -> Plan:
    return min(zip(scores, plans, strict=True), key=lambda pair: (pair[0], pair[1].hash))[1]
