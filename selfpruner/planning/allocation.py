"""Closed-form plans: rates along the depth, and the plan of smallest predicted loss under the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selfpruner.planning.space import Plan, SearchSpace

# Cells of the dynamic programme: a few per FFN step in the largest models, a tenth of a second in the small ones.
CELLS = 16_384
# A loss of this or more: a level that may not be taken.
FORBIDDEN = 1e6


def ramp(space: SearchSpace, slope: float) -> list[float]:
    """One rate per layer, rising by ``slope * rate`` to both sides of the target from the first layer to the last."""
    last = max(space.layers - 1, 1)
    return [space.rate * (1 + slope * (2 * layer / last - 1)) for layer in range(space.layers)]


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
