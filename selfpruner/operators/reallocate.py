"""The plan of smallest expected KL around the best one, from the landscape's model and dynamic programming."""

from __future__ import annotations

import random

from selfpruner.catalogue import OPERATORS
from selfpruner.operators.base import Context, Offspring, Operator
from selfpruner.planning.allocation import cheapest
from selfpruner.planning.space import Plan

# How far a block's rate may move in one step: the model is a sum of losses around the leader, and less true further away.
RADII = (0.1, 0.05, 0.2)


class Reallocate(Operator):
    """Of several children the first takes the losses as expected, of levels near the leader's and of all that were measured or
    foreseen somewhere; the others a draw each from what is still possible (Thompson sampling over plans), in turn within narrow and
    wide bounds."""

    name = "reallocate"
    needs = OPERATORS[name].needs
    picked = False  # its plans are what the landscape promises already

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:
        if context.landscape is None or not context.population:
            return []
        leader = context.population[0]
        here = Plan(leader.levels)
        offspring = []
        for number in range(count):
            radius = RADII[number % len(RADII)]
            losses = context.landscape.losses(rng if number else None, around=here, radius=radius, known=number == 0)
            offspring.append(Offspring(cheapest(context.space, losses), self.name, (leader.plan_hash,)))
        return offspring
