"""Closed-form allocations of other papers, from signals measured on the dense model: OWL, AlphaPruning, FLAP's threshold."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence

from selfpruner.catalogue import OPERATORS
from selfpruner.operators.base import Context, Offspring, Operator
from selfpruner.planning.space import Plan, SearchSpace

# OWL: no layer's rate is further than this from the highest-rated layer's half-way point (the paper's lambda).
OWL_LAMBDA = 0.08

# AlphaPruning: how far a layer's rate may be from the mean, as a share of it (the paper's tau for LLMs, 0.2 to 0.3).
ALPHA_BAND = 0.3


class Owl(Operator):
    """Layers with more outliers keep more: rates linear in the outlier ratio, within 2 lambda of each other (arXiv 2310.05175)."""

    name = "owl"

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:  # noqa: ARG002
        ratios = context.signals.get("outlier_ratio")
        if not ratios:
            return []
        return [Offspring(context.space.project(owl_rates(ratios, context.space.rate)), self.name)]


def owl_rates(ratios: Sequence[float], rate: float, band: float = OWL_LAMBDA) -> list[float]:
    """One rate per layer with mean ``rate``: the layer with the most outliers is 2 ``band`` below the one with the fewest."""
    low, high = min(ratios), max(ratios)
    kept = [2 * band * (ratio - low) / (high - low) if high > low else 0.0 for ratio in ratios]
    mean = sum(kept) / len(kept)
    return [rate + mean - share for share in kept]


class Alpha(Operator):
    """Layers with heavier-tailed spectra keep more: rates linear in the exponents (AlphaPruning, arXiv 2410.10912)."""

    name = "alpha"
    needs = OPERATORS[name].needs

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:  # noqa: ARG002
        exponents = context.signals.get("spectral_exponents")
        if not exponents:
            return []
        return [Offspring(context.space.project(alpha_rates(exponents, context.space.rate)), self.name)]


def alpha_rates(exponents: Sequence[float], rate: float, band: float = ALPHA_BAND) -> list[float]:
    """One rate per layer with mean ``rate``, from (1 - ``band``) to (1 + ``band``) times a common factor."""
    low, high = min(exponents), max(exponents)
    shares = [1 + band * (2 * (value - low) / (high - low) - 1) if high > low else 1.0 for value in exponents]
    return [rate * share * len(shares) / sum(shares) for share in shares]


class FlapGlobal(Operator):
    """One threshold on the standardised scores of all units of the model (FLAP's AL-AM, arXiv 2312.11983)."""

    name = "flap_global"

    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:  # noqa: ARG002
        thresholds = context.signals.get("flap_thresholds")
        if not thresholds:
            return []
        space = context.space
        return [Offspring(space.project(space.rates(below_threshold(space, thresholds))), self.name)]


def below_threshold(space: SearchSpace, thresholds: Sequence[Sequence[float]]) -> Plan:
    """The levels that one global threshold gives, the one whose removed parameters come closest to the target.

    ``thresholds`` holds per block and level the threshold at which the block falls to that level, never falling with the level.
    """

    def at(threshold: float) -> Plan:
        return Plan(tuple(max(bisect_right(levels, threshold) - 1, 0) for levels in thresholds))

    values = sorted({value for levels in thresholds for value in levels})
    low, high = 0, len(values) - 1  # what is removed never falls with the threshold
    while low < high:
        middle = (low + high) // 2
        if space.removed(at(values[middle])) < space.target:
            low = middle + 1
        else:
            high = middle
    around = [at(value) for value in values[max(low - 1, 0) : low + 1]]
    return min(around, key=lambda plan: abs(space.removed(plan) - space.target))
