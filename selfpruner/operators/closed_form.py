"""Operators that make plans from nothing but the space and the probes: uniform, ramp, sensitivity, random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from selfpruner.operators.base import Context, Offspring
from selfpruner.space import Plan, SearchSpace

# End-to-end change of the rate over the depth, as a share of the target rate: early layers keep more when positive.
SLOPES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, -0.2, -0.4, -0.6)


class Uniform:
    """The target rate everywhere."""

    name = "uniform"

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:  # noqa: ARG002
        return [Offspring(context.space.project([context.space.rate] * context.space.layers), self.name)]


class Ramp:
    """Rates linear in depth, one plan per slope (ATP, peers.md: a grid of at most nine). Slope 0 is the uniform plan."""

    name = "ramp"

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:  # noqa: ARG002
        space = context.space
        return [Offspring(space.project(ramp(space, slope)), self.name) for slope in SLOPES[1 : count + 1]]


def ramp(space: SearchSpace, slope: float) -> list[float]:
    """One rate per layer, rising by ``slope * rate`` to both sides of the target from the first layer to the last."""
    last = max(space.layers - 1, 1)
    return [space.rate * (1 + slope * (2 * layer / last - 1)) for layer in range(space.layers)]


class Random:
    """Rates drawn around the target: normal with a spread of half of it."""

    name = "random"

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:
        space = context.space
        return [
            Offspring(space.project([rng.gauss(space.rate, space.rate / 2) for _ in space.dials]), self.name) for _ in range(count)
        ]


class Sensitivity:
    """The plan of smallest predicted KL under the budget, and less trusting mixtures of it with the uniform plan.

    A block's predicted KL at a level is its probe's KL times the level's error over the probed level's error; blocks add up.
    """

    name = "sensitivity"

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:  # noqa: ARG002
        if not context.sensitivities:
            return []
        space = context.space
        losses = predicted_losses(space, context.sensitivities, context.probe_levels)
        best = cheapest(space, losses)
        uniform = space.project([space.rate] * space.layers)
        found = [Offspring(best, self.name)]
        for trust in (0.75, 0.5, 0.25)[: max(0, count - 1)]:
            pairs = zip(space.rates(best), space.rates(uniform), strict=True)
            found.append(Offspring(space.project([trust * a + (1 - trust) * b for a, b in pairs]), self.name))
        return found


def predicted_losses(space: SearchSpace, sensitivities: Sequence[float], probe_levels: Sequence[int]) -> list[list[float]]:
    """Per block and level: probe KL * error(level) / error(probed level). Nats per token; never falling with the level."""
    losses = []
    for block, kl, level in zip(space.blocks, sensitivities, probe_levels, strict=True):
        scale = max(kl, 0.0) / max(block.options[level].error, 1e-12) if level else 0.0
        rising, curve = 0.0, []
        for option in block.options:
            rising = max(rising, scale * option.error)
            curve.append(rising)
        losses.append(curve)
    return losses


def cheapest(space: SearchSpace, losses: Sequence[Sequence[float]]) -> Plan:
    """The plan of smallest summed loss within the budget, by dynamic programming over what is removed.

    Sizes are counted in quarters of an FFN step, rounded; the projection settles what rounding left over.
    """
    import numpy as np

    quantum = max(space.step // 4, 1)
    need = -(-space.target // quantum)
    best = np.full(need + 1, np.inf)  # best[u]: smallest loss that removes at least u quanta with the dials so far
    best[0] = 0.0
    choices = []
    for dial in space.dials:
        total = np.full(need + 1, np.inf)
        choice = np.zeros(need + 1, dtype=np.int32)
        for position, setting in enumerate(dial.settings):
            units = round(dial.removed[position] / quantum)
            loss = sum(losses[block][level] for block, level in zip(dial.blocks, setting, strict=True))
            before = np.concatenate((np.full(min(units, need), best[0]), best[: max(need + 1 - units, 1)]))[: need + 1]
            better = before + loss < total
            total[better] = before[better] + loss
            choice[better] = position
        best = total
        choices.append(choice)
    left, positions = need, [0] * len(space.dials)
    for index in range(len(space.dials) - 1, -1, -1):
        position = int(choices[index][left])
        positions[index] = position
        left = max(0, left - round(space.dials[index].removed[position] / quantum))
    return space.project([dial.rate(p) for dial, p in zip(space.dials, positions, strict=True)])
