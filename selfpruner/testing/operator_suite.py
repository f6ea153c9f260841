"""What every classical operator must do: legal plans within the budget, the same for a seed, in any space."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from selfpruner.operators import CLASSICAL, Context, Offspring, Operator
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.records import Candidate
from selfpruner.testing.spaces import SpaceShape, positions, shape, space_of

SPACES: dict[str, SpaceShape] = {
    "blocks": {"rate": 0.2},
    "layers": {"rate": 0.2, "granularity": "layer"},
    "biased": {"rate": 0.3, "bias": True, "channels": 100},
    "half gone": {"rate": 0.5, "drop": True},
    "ffn only": {"rate": 0.2, "mode": "none"},
    "one layer": {"layers": 1, "rate": 0.3},
    "smollm": shape(rate=0.2, bias=True),
    "large layers": shape(rate=0.3, bias=True, granularity="layer"),
}


def candidate_of(space: SearchSpace, plan: Plan, relative: float = 1.0) -> Candidate:
    rates = tuple(space.rates(plan))
    return Candidate(plan.hash, plan.levels, rates, 0, "random", status="evaluated", fitness=relative, relative=relative)


def context_of(space: SearchSpace, members: int = 5, **changes: object) -> Context:
    rng = random.Random(1)
    plans = [space.project([rng.random() for _ in space.dials]) for _ in range(members)]
    population = [candidate_of(space, plan, 1 + 0.1 * index) for index, plan in enumerate(dict.fromkeys(plans))]
    facts: dict[str, Any] = {"population": population, "history": population, "seen": frozenset(c.plan_hash for c in population)}
    facts["sensitivities"] = [rng.uniform(0.01, 1.0) for _ in space.blocks]
    facts["probe_levels"] = [min(1, len(block.options) - 1) for block in space.blocks]
    facts["signals"] = {
        "outlier_ratio": [rng.uniform(0.001, 0.02) for _ in range(space.layers)],
        "spectral_exponents": [rng.uniform(2, 6) for _ in range(space.layers)],
        "flap_thresholds": [sorted(rng.uniform(-1, 2) for _ in block.options) for block in space.blocks],
    }
    return Context(space, 1, 5, **{**facts, **changes})


class OperatorSuite:
    """Subclass it with ``operator``; ``members``: how many of the population it needs to say anything."""

    operator: ClassVar[type[Operator]]
    members: ClassVar[int] = 0

    def propose(self, context: Context, count: int, seed: int = 0) -> list[Offspring]:
        return asyncio.run(self.operator().propose(context, count, random.Random(seed)))

    def test_is_registered(self) -> None:
        assert CLASSICAL[self.operator.name] is self.operator

    @pytest.mark.parametrize("name", SPACES)
    def test_plans_are_legal_and_within_the_budget(self, name: str) -> None:
        space = space_of(**SPACES[name])
        context = context_of(space)
        children = self.propose(context, 9)
        assert children or len(context.population) < self.members
        known = {member.plan_hash for member in context.population}
        for child in children:
            space.check(child.plan)
            assert space.meets_budget(child.plan)
            assert child.operator == self.operator.name
            assert set(child.parents) <= known
            positions(space, child.plan.levels)  # a setting of every dial

    def test_equal_seeds_equal_plans(self) -> None:
        context = context_of(space_of(**SPACES["smollm"]))
        assert self.propose(context, 6, seed=4) == self.propose(context, 6, seed=4)

    def test_count_is_respected(self) -> None:
        context = context_of(space_of(**SPACES["smollm"]))
        assert len(self.propose(context, 2)) <= 4
        assert len(self.propose(context, 1)) <= 1

    def test_too_small_a_population_gives_nothing(self) -> None:
        for members in range(self.members):
            assert self.propose(context_of(space_of(), members), 3) == []

    def test_says_nothing_without_what_it_needs_and_can_do_without_the_rest(self) -> None:
        context = context_of(space_of(**SPACES["smollm"]))
        signals = {name: values for name, values in context.signals.items() if name != "spectral_exponents"}
        for need, without in (("probes", {"sensitivities": (), "probe_levels": ()}), ("spectra", {"signals": signals})):
            assert bool(self.propose(replace(context, **without), 3)) == (need not in self.operator.needs)

    def test_as_many_as_asked_where_it_has_no_end(self) -> None:
        if self.operator.endless:
            assert len(self.propose(context_of(space_of(**SPACES["smollm"])), 40)) == 40

    def test_two_parents_where_it_crosses(self) -> None:
        children = self.propose(context_of(space_of(**SPACES["smollm"])), 4)
        assert self.operator.crosses == all(len(child.parents) == 2 for child in children)

    def test_no_global_randomness(self) -> None:
        before = random.getstate()
        self.propose(context_of(space_of()), 4)
        assert random.getstate() == before
