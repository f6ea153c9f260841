"""Operators that make plans from nothing but the space and the probes: uniform, ramp, sensitivity, random."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from selfpruner.operators.base import Context, Offspring
from selfpruner.space import Plan, SearchSpace

# End-to-end change of the rate over the depth, as a share of the target rate: early layers keep more when positive.
SLOPES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, -0.2, -0.4, -0.6)

# Cells of the dynamic programme: a few per FFN step in the largest models, a tenth of a second in the small ones.
CELLS = 16_384
# A loss of this or more: a level that may not be taken.
FORBIDDEN = 1e6


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

    Sizes are counted in the largest unit that divides them all, so the result is exact; in a large model in coarser ones, and
    the projection settles what rounding left over.
    """
    import numpy as np

    unit = math.gcd(*(gone for dial in space.dials for gone in dial.removed)) or 1
    quantum = unit * max(1, -(-space.target // (unit * CELLS)))
    need = -(-space.target // quantum)
    top = max(-(-(space.target + space.step) // quantum), need + 1)
    best = np.full(top, np.inf)  # best[u]: smallest loss that removes u quanta with the dials so far
    best[0] = 0.0
    choices, sizes = [], [[round(gone / quantum) for gone in dial.removed] for dial in space.dials]
    for dial, size in zip(space.dials, sizes, strict=True):
        total = np.full(top, np.inf)
        choice = np.zeros(top, dtype=np.int32)
        for position, (units, setting) in enumerate(zip(size, dial.settings, strict=True)):
            if units >= top:
                break
            loss = sum(losses[block][level] for block, level in zip(dial.blocks, setting, strict=True))
            if loss >= FORBIDDEN:
                continue
            with_it = best[: top - units] + loss
            better = with_it < total[units:]
            total[units:][better] = with_it[better]
            choice[units:][better] = position
        best = total
        choices.append(choice)
    if not np.isfinite(best[need:]).any():
        return space.project([space.rate] * space.layers)
    left, rates = need + int(best[need:].argmin()), []
    for dial, size, choice in zip(reversed(space.dials), reversed(sizes), reversed(choices), strict=True):
        position = int(choice[left])
        rates.append(dial.rate(position))
        left -= size[position]
    return space.project(rates[::-1])
