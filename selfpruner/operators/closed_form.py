"""Operators that need only the space and the probes: uniform, ramp, sensitivity, random."""

from __future__ import annotations

import random

from selfpruner.catalogue import OPERATORS
from selfpruner.operators.base import Context, Offspring, Operator
from selfpruner.planning.allocation import cheapest, predicted_losses, ramp

# End-to-end change of the rate over the depth, as a share of the target rate: early layers keep more when positive.
SLOPES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, -0.2, -0.4, -0.6)


class Uniform(Operator):
    """The target rate everywhere."""

    name = "uniform"

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:  # noqa: ARG002
        return [Offspring(context.space.project([context.space.rate] * context.space.layers), self.name)]


class Ramp(Operator):
    """Rates linear in depth, one plan per slope (ATP, peers.md: a grid of at most nine). Slope 0 is the uniform plan."""

    name = "ramp"

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:  # noqa: ARG002
        space = context.space
        return [Offspring(space.project(ramp(space, slope)), self.name) for slope in SLOPES[1 : count + 1]]


class Random(Operator):
    """Rates drawn around the target: normal with a spread of half of it."""

    name = "random"
    endless = True
    picked = False  # what is known of the landscape has no say here

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:
        space = context.space
        return [
            Offspring(space.project([rng.gauss(space.rate, space.rate / 2) for _ in space.dials]), self.name) for _ in range(count)
        ]


class Sensitivity(Operator):
    """The plan of smallest predicted KL under the budget, and less trusting mixtures of it with the uniform plan.

    A block's predicted KL at a level is its probe's KL times the level's error over the probed level's error; blocks add up.
    """

    name = "sensitivity"
    needs = OPERATORS[name].needs

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:  # noqa: ARG002
        if not context.sensitivities:
            return []
        space = context.space
        losses = predicted_losses(space, context.sensitivities, context.probe_levels)
        best = cheapest(space, losses)
        uniform = space.project([space.rate] * space.layers)
        offspring = [Offspring(best, self.name)]
        for trust in (0.75, 0.5, 0.25)[: max(0, count - 1)]:
            pairs = zip(space.rates(best), space.rates(uniform), strict=True)
            offspring.append(Offspring(space.project([trust * a + (1 - trust) * b for a, b in pairs]), self.name))
        return offspring
