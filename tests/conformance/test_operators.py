"""What every classical operator must do: legal plans within the budget, the same for a seed, in any space."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfpruner import catalogue
from selfpruner.config import SearchConfig
from selfpruner.operators import CLASSICAL, OPERATORS, Context, LlmOperator, Offspring
from selfpruner.operators.allocation import Alpha, FlapGlobal, Owl, alpha_rates, below_threshold, owl_rates
from selfpruner.operators.closed_form import SLOPES, Ramp, Random, Sensitivity, Uniform
from selfpruner.operators.evolution import LevelSwitch, Recombine, switch
from selfpruner.operators.reallocate import RADII, Reallocate
from selfpruner.planning import allocation
from selfpruner.planning.allocation import cheapest, predicted_losses, ramp
from selfpruner.planning.landscape import Landscape
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.testing import OperatorSuite
from selfpruner.testing.operator_suite import SPACES, candidate_of, context_of
from selfpruner.testing.spaces import positions, space_of


class TestUniform(OperatorSuite):
    operator = Uniform

    def test_is_the_projection_of_the_target(self) -> None:
        space = space_of(**SPACES["smollm"])
        (child,) = self.propose(context_of(space), 3)
        assert child.plan == space.project([0.2] * space.layers)


class TestRamp(OperatorSuite):
    operator = Ramp

    def test_rates_are_linear_around_the_target(self) -> None:
        space = space_of(layers=5, rate=0.2)
        assert ramp(space, 0.5) == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3])
        assert ramp(space, 0.0) == pytest.approx([0.2] * 5)
        assert len(self.propose(context_of(space), 50)) == len(SLOPES) - 1

    def test_one_layer_cannot_slope(self) -> None:
        space = space_of(**SPACES["one layer"])
        assert all(space.meets_budget(child.plan) for child in self.propose(context_of(space), 3))


class TestSensitivity(OperatorSuite):
    operator = Sensitivity

    def test_without_probes_it_says_nothing(self) -> None:
        assert self.propose(context_of(space_of(), sensitivities=()), 3) == []

    def test_spares_what_is_sensitive(self) -> None:
        space = space_of(layers=6, rate=0.3, mode="none", channels=192)
        loud = [5.0 if block.layer == 2 else 0.1 for block in space.blocks]
        best = self.propose(context_of(space, sensitivities=loud, probe_levels=[0, 4] * 6), 1)[0].plan
        rates = space.layer_rates(best)
        assert rates[2] == min(rates) < 0.1

    def test_mixtures_lie_between_the_closed_form_and_uniform(self) -> None:
        space = space_of(**SPACES["smollm"])
        best, *mixed = self.propose(context_of(space), 4)
        uniform = space.rates(space.project([space.rate] * space.layers))

        def far(plan: Plan) -> float:
            return sum(abs(a - b) for a, b in zip(space.rates(plan), uniform, strict=True))

        distances = [far(best.plan), *(far(child.plan) for child in mixed)]
        assert distances == sorted(distances, reverse=True)


class TestRandom(OperatorSuite):
    operator = Random

    def test_plans_differ(self) -> None:
        children = self.propose(context_of(space_of(**SPACES["smollm"])), 8)
        assert len({child.plan.hash for child in children}) == 8


class TestOwl(OperatorSuite):
    operator = Owl

    def test_without_signals_it_says_nothing(self) -> None:
        assert self.propose(context_of(space_of(), signals={}), 3) == []

    def test_rates_fall_with_the_outliers_within_the_band(self) -> None:
        rates = owl_rates([0.01, 0.03, 0.02, 0.01], 0.3)
        assert rates[1] < rates[2] < rates[0] == rates[3]
        assert max(rates) - min(rates) == pytest.approx(0.16)
        assert sum(rates) / 4 == pytest.approx(0.3)
        assert owl_rates([0.02, 0.02], 0.3) == pytest.approx([0.3, 0.3])

    def test_the_plan_has_the_order_of_the_rates(self) -> None:
        space = space_of(layers=6, rate=0.3, mode="none", channels=192)
        ratios = [0.005 * (layer + 1) for layer in range(6)]
        plan = self.propose(context_of(space, signals={"outlier_ratio": ratios}), 1)[0].plan
        rates = space.layer_rates(plan)
        assert rates == sorted(rates, reverse=True)
        assert rates[0] > rates[-1]


class TestAlpha(OperatorSuite):
    operator = Alpha

    def test_without_signals_it_says_nothing(self) -> None:
        assert self.propose(context_of(space_of(), signals={}), 3) == []

    def test_rates_rise_with_the_exponent_within_the_band(self) -> None:
        rates = alpha_rates([2.0, 6.0, 4.0, 2.0], 0.3)
        assert rates[0] == rates[3] < rates[2] < rates[1]
        assert max(rates) / min(rates) == pytest.approx(1.3 / 0.7)
        assert sum(rates) / 4 == pytest.approx(0.3)
        assert alpha_rates([3.0, 3.0], 0.3) == pytest.approx([0.3, 0.3])

    def test_the_plan_has_the_order_of_the_rates(self) -> None:
        space = space_of(layers=6, rate=0.3, mode="none", channels=192)
        plan = self.propose(context_of(space, signals={"spectral_exponents": [2.0 + layer for layer in range(6)]}), 1)[0].plan
        rates = space.layer_rates(plan)
        assert rates == sorted(rates)
        assert rates[0] < rates[-1]


class TestFlapGlobal(OperatorSuite):
    operator = FlapGlobal

    def test_without_signals_it_says_nothing(self) -> None:
        assert self.propose(context_of(space_of(), signals={}), 3) == []

    def test_what_scores_low_goes_first(self) -> None:
        space = space_of(layers=4, rate=0.2, mode="none", channels=192)
        thresholds = [[block.layer + 0.1 * level for level in range(len(block.options))] for block in space.blocks]
        plan = self.propose(context_of(space, signals={"flap_thresholds": thresholds}), 1)[0].plan
        rates = space.layer_rates(plan)
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < rates[0]

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from(sorted(SPACES)))
    def test_no_other_threshold_comes_closer_to_the_target(self, seed: int, name: str) -> None:
        space = space_of(**SPACES[name])
        rng = random.Random(seed)
        thresholds = [sorted(rng.gauss(0, 1) for _ in block.options) for block in space.blocks]
        found = abs(space.removed(below_threshold(space, thresholds)) - space.target)
        for value in sorted({value for levels in thresholds for value in levels}):
            levels = tuple(max(sum(v <= value for v in of_block) - 1, 0) for of_block in thresholds)
            assert found <= abs(space.removed(Plan(levels)) - space.target)


class TestLevelSwitch(OperatorSuite):
    operator = LevelSwitch
    members = 1

    def test_children_are_neighbours(self) -> None:
        space = space_of(**SPACES["smollm"])
        context = context_of(space)
        members = {member.plan_hash: member for member in context.population}
        for child in self.propose(context, 12):
            (parent,) = child.parents
            pairs = zip(positions(space, child.plan.levels), positions(space, members[parent].levels), strict=True)
            assert sum(a != b for a, b in pairs) <= 20
        assert len({child.plan.hash for child in self.propose(context, 12)}) >= 10

    @pytest.mark.parametrize("first", [0, 3, 7])
    def test_blocks_before_the_first_stay(self, first: int) -> None:
        space, rng = space_of(**SPACES["smollm"]), random.Random(first)
        plan = space.project([0.2] * space.layers)
        children = [switch(space, plan, rng, rng.randint(1, 3), first) for _ in range(200)]
        assert all(child.levels[:first] == plan.levels[:first] for child in children)
        turned = {index for child in children for index, level in enumerate(child.levels) if level != plan.levels[index]}
        assert turned >= set(range(first, len(space.blocks))), "every other block has its turn"

    def test_a_call_s_children_mostly_keep_common_blocks(self) -> None:
        space = space_of(layers=30, rate=0.2)
        context = context_of(space)
        kept = []
        for seed in range(60):
            children = self.propose(context, 8, seed)
            parents = {c.plan_hash: c.levels for c in context.population}
            pairs = [zip(c.plan.levels, parents[c.parents[0]], strict=True) for c in children]
            kept.append(min(next((n for n, (a, b) in enumerate(pair) if a != b), len(space.blocks)) for pair in pairs))
        assert sum(count >= len(space.blocks) // 4 for count in kept) > 30
        assert min(kept) < len(space.blocks) // 8, "now and then the first blocks have their turn"

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from(sorted(SPACES)), st.integers(1, 3))
    def test_exchanges_keep_the_budget(self, seed: int, name: str, exchanges: int) -> None:
        space = space_of(**SPACES[name])
        rng = random.Random(seed)
        plan = space.project([rng.random() for _ in space.dials])
        for _ in range(3):
            plan = switch(space, plan, rng, exchanges)
            assert space.meets_budget(plan)


class TestRecombine(OperatorSuite):
    operator = Recombine
    members = 2

    def test_both_parents_are_named_and_differ(self) -> None:
        for child in self.propose(context_of(space_of(**SPACES["smollm"])), 6):
            assert len(set(child.parents)) == 2

    def test_equal_parents_have_that_child(self) -> None:
        space = space_of(**SPACES["smollm"])
        plan = space.project([0.2] * space.layers)
        twins = [candidate_of(space, plan), candidate_of(space, plan)]
        assert {child.plan for child in self.propose(context_of(space, population=twins), 3)} == {plan}


class TestReallocate(OperatorSuite):
    operator = Reallocate
    members = 1

    def propose(self, context: Context, count: int, seed: int = 0) -> list[Offspring]:
        landscape = Landscape(context.space, context.sensitivities, context.probe_levels) if context.sensitivities else None
        return super().propose(replace(context, landscape=landscape), count, seed)

    def test_the_first_child_is_the_best_expected_one_within_reach(self) -> None:
        context = context_of(space_of(**SPACES["smollm"]))
        landscape = Landscape(context.space, context.sensitivities, context.probe_levels)
        here = Plan(context.population[0].levels)
        first, *others = self.propose(context, 6)
        assert first.plan == cheapest(context.space, landscape.losses(around=here, radius=RADII[0]))
        assert landscape.change(first.plan, here) < 0
        assert first.parents == (context.population[0].plan_hash,)
        assert len({child.plan for child in others} | {first.plan}) == 6, "draws differ"

    def test_children_stay_within_reach_of_the_leader(self) -> None:
        space = space_of(layers=8, rate=0.2, mode="none", channels=384)
        context = context_of(space)
        here = Plan(context.population[0].levels)
        for number, child in enumerate(self.propose(context, 6)):
            pairs = zip(space.rates(child.plan), space.rates(here), strict=True)
            # The projection may turn a dial by one step more, where sizes were rounded.
            assert max(abs(a - b) for a, b in pairs) <= RADII[number % len(RADII)] + 8 / 384 + 1e-9


# -- the closed-form plan ------------------------------------------------------------------------------------------------
def best_by_trying_all(space: SearchSpace, losses: list[list[float]]) -> float:
    """The smallest summed loss of all plans within the budget that the dials can make."""
    best = math.inf
    for choice in product(*(range(len(dial.settings)) for dial in space.dials)):
        if space.target <= sum(dial.removed[p] for dial, p in zip(space.dials, choice, strict=True)) < space.target + space.step:
            best = min(best, cost(space, losses, choice))
    return best


def cost(space: SearchSpace, losses: list[list[float]], choice: Any) -> float:
    pairs = [pair for dial, p in zip(space.dials, choice, strict=True) for pair in zip(dial.blocks, dial.settings[p], strict=True)]
    return sum(losses[block][level] for block, level in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 3, "channels": 48, "mode": "none", "rate": 0.2},
        {"layers": 4, "channels": 32, "mode": "none", "rate": 0.3, "bias": True},
        {"layers": 2, "channels": 64, "mode": "all", "rate": 0.3},
        {"layers": 2, "channels": 72, "mode": "q_head", "rate": 0.4, "heads_per_group": 3},
        {"layers": 4, "channels": 40, "mode": "all", "rate": 0.2, "granularity": "layer"},
    ],
)
def test_the_cheapest_plan_is_the_cheapest_of_all(options: dict[str, Any]) -> None:
    for seed in range(6):
        space = space_of(seed=seed, **options)
        rng = random.Random(seed)
        losses = [[rng.uniform(0.2, 2.0) * option.error**1.3 for option in block.options] for block in space.blocks]
        for curve in losses:
            curve.sort()
        found = cheapest(space, losses)
        assert space.meets_budget(found)
        spent = sum(curve[level] for curve, level in zip(losses, found.levels, strict=True))
        assert spent == pytest.approx(best_by_trying_all(space, losses))


def test_coarse_counting_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of(**SPACES["smollm"])
    rng = random.Random(0)
    slopes = [rng.uniform(0.2, 2.0) for _ in space.blocks]
    losses = [[slope * option.error**1.3 for option in block.options] for slope, block in zip(slopes, space.blocks, strict=True)]

    def spent() -> float:
        plan = cheapest(space, losses)
        assert space.meets_budget(plan)
        return sum(curve[level] for curve, level in zip(losses, plan.levels, strict=True))

    fine = spent()
    monkeypatch.setattr(allocation, "CELLS", 2000)
    assert fine * 0.999 <= spent() <= fine * 1.02


def test_flat_losses_still_meet_the_budget() -> None:
    space = space_of(**SPACES["smollm"])
    assert space.meets_budget(cheapest(space, [[0.0] * len(block.options) for block in space.blocks]))


def test_predicted_losses_follow_the_errors() -> None:
    space = space_of(layers=1, mode="none", channels=32)
    attention, ffn = predicted_losses(space, [0.7, 0.3], [0, 2])
    assert attention == [0.0]
    errors = [option.error for option in space.blocks[1].options]
    assert ffn == pytest.approx([0.3 * error / errors[2] for error in errors])
    assert ffn[2] == pytest.approx(0.3)
    assert predicted_losses(space, [0.7, -0.3], [0, 2])[1] == [0.0] * 4


def test_every_operator_is_what_its_line_says() -> None:
    assert {suite.operator for suite in OperatorSuite.__subclasses__()} == set(CLASSICAL.values())
    for name, operator in OPERATORS.items():
        assert operator.name == name
        assert operator.needs == catalogue.OPERATORS[name].needs
        assert issubclass(operator, LlmOperator) == ("llm" in operator.needs)


@pytest.mark.parametrize("name", catalogue.OPERATORS)
def test_a_config_needs_what_its_operators_need(name: str) -> None:
    entry = catalogue.OPERATORS[name]
    named = {"initial": ("uniform", name)} if entry.initial else {"initial": ("uniform",), "operators": (name,)}
    config = SearchConfig(rate=0.2, **{"operators": (), **named})
    assert config.needs == entry.needs
