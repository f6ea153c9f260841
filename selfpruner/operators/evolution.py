"""Classical operators: budget-preserving level switches (EvoPress) and uniform recombination of two parents."""

from __future__ import annotations

import random
from collections.abc import Sequence

from selfpruner.errors import BudgetError
from selfpruner.operators.base import Context, Offspring, Operator
from selfpruner.planning.space import Plan, SearchSpace

# Three times out of four the children of one call keep all blocks before a common one, drawn from this part of the plan: the engine
# passes them once for the parent and all of its children.
KEPT = (0.3, 0.9)
KEEPING = 0.75


class LevelSwitch(Operator):
    """Some dials one setting up, as many down, budget repaired; min of two draws from 1..3 exchanges, as in EvoPress. A call's
    children mostly differ from their parents behind a common block only, another one every time."""

    name = "level_switch"
    endless = True

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:
        if not context.population:
            return []
        offspring = []
        first = common_blocks(context.space, rng)
        for _ in range(count):
            # Better parents more often: the minimum of two draws.
            parent = context.population[min(rng.randrange(len(context.population)), rng.randrange(len(context.population)))]
            plan = switch(context.space, Plan(parent.levels), rng, min(rng.randint(1, 3), rng.randint(1, 3)), first)
            offspring.append(Offspring(plan, self.name, (parent.plan_hash,)))
        return offspring


class Recombine(Operator):
    """Every layer's rates from one of two parents, then the budget is repaired."""

    name = "recombine"
    crosses = True

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:
        if len(context.population) < 2:
            return []
        offspring = []
        for _ in range(count):
            first, second = rng.sample(list(context.population), 2)
            space = context.space
            a, b = space.rates(Plan(first.levels)), space.rates(Plan(second.levels))
            take = [rng.random() < 0.5 for _ in range(space.layers)]
            layer_of = [space.blocks[dial.blocks[0]].layer for dial in space.dials]
            rates = [x if take[layer] else y for x, y, layer in zip(a, b, layer_of, strict=True)]
            offspring.append(Offspring(space.project(rates), self.name, (first.plan_hash, second.plan_hash)))
        return offspring


def common_blocks(space: SearchSpace, rng: random.Random) -> int:
    """How many of the first blocks a generation's children are to keep."""
    return round(rng.uniform(*KEPT) * len(space.blocks)) if rng.random() < KEEPING else 0


def switch(space: SearchSpace, plan: Plan, rng: random.Random, exchanges: int, first: int = 0) -> Plan:
    """A neighbour of ``plan``: dials that go down by one setting pay for dials that go up, until the budget holds again. Dials of
    blocks before ``first`` stay, unless only the projection finds a way to meet the budget."""
    positions = [dial.settings.index(tuple(plan.levels[b] for b in dial.blocks)) for dial in space.dials]
    dials = [index for index, dial in enumerate(space.dials) if min(dial.blocks) >= first]
    for _ in range(exchanges):
        up = [d for d in dials if positions[d] + 1 < len(space.dials[d].removed)]
        if not up:
            break
        more = rng.choice(up)
        gained = space.dials[more].removed[positions[more] + 1] - space.dials[more].removed[positions[more]]
        positions[more] += 1
        # Give back about as much elsewhere, one or more settings of other dials.
        while gained > 0:
            down = [d for d in dials if d != more and positions[d] > 0]
            if not down:
                break
            less = rng.choice(down)
            given = space.dials[less].removed[positions[less]] - space.dials[less].removed[positions[less] - 1]
            if given > 2 * gained and rng.random() < 0.75:
                continue
            positions[less] -= 1
            gained -= given
    _settle(space, positions, [d for d in dials if space.dials[d].fine], rng)
    rates = [dial.rate(position) for dial, position in zip(space.dials, positions, strict=True)]
    try:
        return space.project(rates)
    except BudgetError:
        return plan


def _settle(space: SearchSpace, positions: list[int], fine: Sequence[int], rng: random.Random) -> None:
    """Turn fine dials one way, drawn one after the other, until the budget holds: the projection would take any. What is left where
    none can be turned, or a last step was too large, is the projection's."""
    over = sum(dial.removed[p] for dial, p in zip(space.dials, positions, strict=True)) - space.target
    way = 1 if over < 0 else -1
    while over < 0 if way > 0 else over >= space.step:
        free = [d for d in fine if 0 <= positions[d] + way < len(space.dials[d].removed)]
        if not free:
            return
        turned = rng.choice(free)
        removed = space.dials[turned].removed
        over += removed[positions[turned] + way] - removed[positions[turned]]
        positions[turned] += way
