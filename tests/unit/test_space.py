"""Levels, budget and projection: every vector of rates becomes a legal plan, the nearest one, in the order it asked for."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from selfpruner.errors import BudgetError, ConfigError
from selfpruner.planning.space import (
    Block,
    Option,
    Plan,
    SearchSpace,
    attention_shapes,
    default_ffn_step,
    ffn_widths,
    without_dominated,
)
from selfpruner.testing.spaces import positions, shape, space_of

FAST = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Tiny to middling models of every shape; those whose target nothing can meet are left out."""
    step = draw(st.sampled_from([8, 16, 24]))
    options: dict[str, Any] = {
        "layers": draw(st.sampled_from([1, 2, 3, 5, 12])),
        "hidden": draw(st.sampled_from([8, 32, 64])),
        "channels": draw(st.sampled_from([28, 36, 64, 100, 256])),
        "step": step,
        "kv_groups": draw(st.integers(1, 4)),
        "heads_per_group": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([4, 8])),
        "mode": draw(st.sampled_from(["all", "q_head", "kv_group", "none"])),
        "drop": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "rate": draw(st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5])),
        "granularity": draw(st.sampled_from(["layer", "block"])),
        "seed": draw(st.integers(0, 3)),
    }
    try:
        space = space_of(**options)
        space.project([0.5] * len(space.dials))
    except BudgetError:
        assume(False)
        raise
    return space


def rates_of(space: SearchSpace) -> st.SearchStrategy[list[float]]:
    wild = st.floats(-1e6, 1e6)
    return st.one_of(
        st.lists(st.one_of(st.floats(0, 1), wild), min_size=len(space.dials), max_size=len(space.dials)),
        st.sampled_from([[0.0] * len(space.dials), [1.0] * len(space.dials), [space.rate] * len(space.dials)]),
        st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=space.layers, max_size=space.layers),
    )


@FAST
@given(st.data(), spaces())
def test_any_rates_become_a_legal_plan_within_the_budget(data: st.DataObject, space: SearchSpace) -> None:
    plan = space.project(data.draw(rates_of(space)))
    space.check(plan)
    assert space.target <= space.removed(plan) < space.target + space.step
    assert space.meets_budget(plan)
    assert all(0 <= rate <= 1 for rate in (*space.block_rates(plan), *space.layer_rates(plan)))


@FAST
@given(st.data(), spaces())
def test_a_plan_within_the_budget_projects_to_itself(data: st.DataObject, space: SearchSpace) -> None:
    plan = space.project(data.draw(rates_of(space)))
    assert space.project(space.rates(plan)) == plan


@FAST
@given(st.data(), spaces())
def test_a_dial_asked_for_more_never_gets_less_than_its_like(data: st.DataObject, space: SearchSpace) -> None:
    rates = data.draw(rates_of(space).filter(lambda rates: len(rates) == len(space.dials)))
    at = positions(space, space.project(rates).levels)
    asked = [min(max(rate, 0.0), 1.0) for rate in rates]
    for (i, a), (j, b) in product(enumerate(space.dials), repeat=2):
        if a.removed == b.removed and asked[i] < asked[j]:
            assert at[i] <= at[j]


@FAST
@given(st.data(), spaces())
def test_removing_a_constant_from_all_rates_changes_nothing(data: st.DataObject, space: SearchSpace) -> None:
    """Only differences count: the projection shifts all rates by one amount, until bounds cut in."""
    rates = data.draw(st.lists(st.floats(0.3, 0.5), min_size=len(space.dials), max_size=len(space.dials)))
    exact = [
        any(abs(dial.rate(p) - rate) < 1e-6 for p in range(len(dial.removed)))
        for dial, rate in zip(space.dials, rates, strict=True)
    ]
    assume(not any(exact))
    first, second = space.project(rates), space.project([rate - 0.125 for rate in rates])
    # The shift is found by bisection, and rounding may tip a dial that stands between two settings.
    apart = sum(abs(a - b) for a, b in zip(positions(space, first.levels), positions(space, second.levels), strict=True))
    assert apart <= 2


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("bias", [False, True])
def test_uniform_rates_of_a_real_model_stay_near_the_target(granularity: Any, bias: bool) -> None:
    space = space_of(**shape(rate=0.2, granularity=granularity, bias=bias))
    plan = space.project([0.2] * space.layers)
    at = positions(space, plan.levels)
    assert space.meets_budget(plan)
    last = [p for p, dial in zip(at, space.dials, strict=True) if len(dial.removed) == len(space.dials[-1].removed)]
    assert max(last) - min(last) <= 1, "equal rates differ by one step at most"
    ups = [index for index, p in enumerate(last) if p == max(last)]
    if 1 < len(ups) < len(last) - 1:
        assert max(ups) - min(ups) > len(last) // 2, "the last steps are spread over the depth"


def test_a_large_model_projects_at_once() -> None:
    space = space_of(layers=80, hidden=8192, channels=28672, step=1024, kv_groups=8, heads_per_group=8, head_dim=128, bias=True)
    assert space.meets_budget(space.project([layer / 80 for layer in range(80)]))


def test_where_single_turns_go_round_in_circles_a_plan_is_found_all_the_same() -> None:
    # One dial of large even steps, one of few odd ones: only 3 * 40 + 25 = 145 lies in [140, 150).
    coarse = Block(0, "attention", tuple(Option(1000 - 40 * i) for i in range(20)))
    odd = Block(0, "ffn", (Option(100), Option(75)))
    space = SearchSpace((coarse, odd), 1400, 0.1, 10)
    for rates in ([0.0, 0.0], [1.0, 1.0], [0.16, 0.0], [0.0, 1.0]):
        assert space.project(rates) == Plan((3, 1))


def test_the_exact_search_keeps_the_order_too() -> None:
    coarse = tuple(Block(layer, "attention", tuple(Option(1000 - 40 * i) for i in range(20))) for layer in range(3))
    odd = Block(3, "ffn", (Option(100), Option(75)))
    space = SearchSpace((*coarse, odd), 3100, 265 / 3100, 10)
    plan = space.project([0.3, 0.1, 0.2, 0.0])
    assert space.removed(plan) == 265
    assert plan.levels[0] >= plan.levels[2] >= plan.levels[1]


@FAST
@given(spaces())
def test_plain_data_round_trip(space: SearchSpace) -> None:
    adapter = TypeAdapter(SearchSpace)
    again = adapter.validate_json(adapter.dump_json(space))
    assert again == space
    assert again.dials == space.dials
    assert (again.target, again.step, again.granularity) == (space.target, space.step, space.granularity)


def test_plan_hashes_are_stable() -> None:
    # Stored in databases and checkpoints: they may never change.
    assert Plan((0, 1, 2, 3)).hash == "84deff01f1994516"
    assert Plan(()).hash == "e3b0c44298fc1c14"
    assert Plan((1, 12)).hash != Plan((11, 2)).hash


@pytest.mark.parametrize("count", [0, 1, 7, 9, 100])
def test_wrong_lengths_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=r"expected 8 rates \(or 4, one per layer\)") as caught:
        space_of().project([0.2] * count)
    assert caught.value.param == "rates"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        space_of().project([0.2] * 7 + [bad])


def test_negative_and_huge_rates_are_clipped() -> None:
    space = space_of()
    assert space.project([-5.0, 1e300] * 4) == space.project([0.0, 1.0] * 4)


def test_one_rate_per_layer_sets_both_blocks() -> None:
    space = space_of(rate=0.3)
    per_layer = [0.1, 0.2, 0.4, 0.5]
    assert space.project(per_layer) == space.project([rate for rate in per_layer for _ in range(2)])


def test_a_target_out_of_reach_says_what_can_be_reached() -> None:
    with pytest.raises(
        BudgetError, match=r"asks to remove [\d,]+ parameters; this search space can remove at most [\d,]+"
    ) as caught:
        space_of(rate=0.99)
    assert caught.value.param == "rate"
    assert caught.value.code == "budget_unreachable"


def test_a_target_between_the_steps_is_a_budget_error() -> None:
    coarse = Block(0, "attention", tuple(Option(1000 - 100 * i) for i in range(5)))
    space = SearchSpace((coarse,), 1000, 0.15, 10)
    with pytest.raises(BudgetError, match="ffn_step"):
        space.project([0.2])


@pytest.mark.parametrize(
    ("plan", "match"),
    [(Plan((0,) * 7), "8 levels, got 7"), (Plan((0,) * 7 + (99,)), "layer 3 ffn: level 99"), (Plan((-1,) + (0,) * 7), "level -1")],
)
def test_plans_of_another_model_are_refused(plan: Plan, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        space_of().check(plan)
    assert caught.value.param == "plan"


def test_rates_count_parameters() -> None:
    space = space_of(layers=1, hidden=32, channels=96, rate=0.1)
    attention, ffn = space.blocks
    plan = Plan((1, 3))
    gone = attention.removed(1) + ffn.removed(3)
    assert ffn.removed(3) == 3 * 8 * 3 * 32
    assert space.removed(plan) == gone
    assert space.block_rates(plan) == [attention.removed(1) / attention.options[0].parameters, 24 / 96]
    assert space.layer_rates(plan) == [gone / (attention.options[0].parameters + ffn.options[0].parameters)]
    assert space.removed(space.dense) == 0


def test_options_must_shrink() -> None:
    with pytest.raises(ConfigError, match="strictly smaller"):
        Block(0, "ffn", (Option(10), Option(10)))
    with pytest.raises(ConfigError, match="strictly smaller"):
        Block(0, "ffn", ())


@pytest.mark.parametrize(
    ("width", "step", "drop", "expected"),
    [
        (64, 16, False, [64, 48, 32, 16]),
        (64, 16, True, [64, 48, 32, 16, 0]),
        (36, 16, False, [36, 32, 16]),
        (17, 16, False, [17, 16]),
        (16, 16, True, [16, 0]),
        (8, None, True, [8, 0]),
    ],
)
def test_ffn_widths(width: int, step: int | None, drop: bool, expected: list[int]) -> None:
    assert ffn_widths(width, step, drop=drop) == expected


def test_a_step_as_wide_as_the_ffn_is_refused() -> None:
    with pytest.raises(ConfigError, match="use less than 16") as caught:
        ffn_widths(16, 16)
    assert caught.value.param == "ffn_step"


@given(st.integers(1, 60_000))
def test_the_default_step_is_a_multiple_of_eight_near_a_24th(width: int) -> None:
    step = default_ffn_step(width)
    assert step % 8 == 0
    assert step == 8 or abs(step - width / 24) <= 4


def test_attention_shapes() -> None:
    assert attention_shapes(2, 3, "all") == [(2, 3), (2, 2), (2, 1), (1, 3), (1, 2), (1, 1)]
    assert attention_shapes(2, 3, "q_head") == [(2, 3), (2, 2), (2, 1)]
    assert attention_shapes(2, 3, "kv_group") == [(2, 3), (1, 3)]
    assert attention_shapes(2, 3, "none") == [(2, 3)]
    assert attention_shapes(2, 3, "none", drop=True) == [(2, 3)]
    assert attention_shapes(1, 2, "kv_group", drop=True) == [(1, 2), (0, 0)]


@given(st.integers(1, 60_000), st.integers(1, 64))
def test_a_step_for_ranks_divides_among_them(width: int, ranks: int) -> None:
    step = default_ffn_step(width * ranks, ranks)
    assert step % 8 == step % ranks == 0


def test_shapes_for_ranks() -> None:
    assert attention_shapes(4, 2, "all", ranks=2) == [(4, 2), (4, 1), (2, 2), (2, 1)]
    assert attention_shapes(4, 2, "kv_group", ranks=4, drop=True) == [(4, 2), (0, 0)]
    # Fewer KV heads than ranks: every rank gets a copy, so all stay, and the query heads divide.
    assert attention_shapes(2, 8, "all", ranks=4) == [(2, 8), (2, 6), (2, 4), (2, 2)]
    for groups, heads, ranks in ((3, 3, 2), (1, 3, 2), (6, 1, 4), (3, 4, 4)):
        with pytest.raises(ConfigError, match="do not divide among tensor_parallel") as caught:
            attention_shapes(groups, heads, "all", ranks=ranks)
        assert caught.value.param == "tensor_parallel"
    with pytest.raises(ConfigError, match="100 FFN channels do not divide") as caught:
        ffn_widths(100, 24, ranks=3)
    assert caught.value.param == "tensor_parallel"
    with pytest.raises(ConfigError, match="ffn_step 32 does not divide by tensor_parallel 3"):
        ffn_widths(96, 32, ranks=3)


@settings(deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4, 8]),
    groups=st.integers(1, 4),
    heads=st.integers(1, 4),
    step=st.sampled_from([32, 256]),
    mode=st.sampled_from(["all", "q_head", "kv_group"]),
    drop=st.booleans(),
    granularity=st.sampled_from(["layer", "block"]),
    rates=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_every_plan_is_one_that_runtimes_take(
    ranks: int, groups: int, heads: int, step: int, mode: Any, drop: bool, granularity: Any, rates: list[float]
) -> None:
    """Every level, and so every plan that is proposed, divides among the ranks, has rows of so many channels, and whole groups."""
    options: dict[str, Any] = {"kv_groups": groups * ranks, "heads_per_group": heads, "mode": mode, "ranks": ranks}
    space = space_of(channels=6 * step, step=step, drop=drop, rate=0.25, granularity=granularity, **options)
    plans = [Plan(tuple(min(level, len(block.options) - 1) for block in space.blocks)) for level in range(40)]
    with suppress(BudgetError):  # a few coarse spaces have no plan of this rate
        plans.append(space.project(rates))
    for plan in plans:
        for block, level in zip(space.blocks, plan.levels, strict=True):
            option = block.options[level]
            assert option.kv_groups % ranks == option.heads % ranks == 0
            assert option.channels % step == option.channels % ranks == 0
            if mode == "kv_group":
                assert option.heads == option.kv_groups * heads


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0])), min_size=1, max_size=12))
def test_dominated_options_are_left_out(pairs: list[tuple[int, float]]) -> None:
    dense = Option(13, 0.0)
    kept = without_dominated([dense, *(Option(size, error) for size, error in pairs)])
    assert kept[0] == dense
    Block(0, "attention", kept)  # strictly falling
    assert all(a.error < b.error for a, b in pairwise(kept[1:])), "smaller costs more error"
    for size, error in pairs:
        inside = any(option.parameters == size and option.error == error for option in kept)
        beaten = any(option.parameters <= size and option.error <= error for option in kept)
        assert inside or beaten
