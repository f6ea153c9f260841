"""The model of the landscape against landscapes that are known: what it learns, how much it believes, what it advises."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from selfpruner.planning.allocation import FORBIDDEN, cheapest, predicted_losses
from selfpruner.planning.landscape import Landscape, Reference, spearman
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.testing.spaces import space_of

TOKENS = 4096


class World:
    """A landscape that really is a sum over blocks, and on every window a slightly different one.

    The probes of the dense model see each block's loss through a factor of its own, as a pruned model's blocks differ from the
    dense one's.
    """

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.space = space
        self.weights = [rng.lognormvariate(-3, 0.5) for _ in space.blocks]
        self.levels = [min(2, len(block.options) - 1) for block in space.blocks]
        seen = zip(self.weights, self.levels, space.blocks, strict=True)
        self.probes = [w * block.options[level].error * rng.lognormvariate(0, 0.5) for w, level, block in seen]

    def kl(self, plan: Plan, window: str | None = None) -> float:
        rng = random.Random(window)
        noise = [1.0 if window is None else rng.gauss(1, 0.2) for _ in self.weights]
        parts = zip(self.weights, noise, self.space.blocks, plan.levels, strict=True)
        return sum(w * n * block.options[level].error for w, n, block, level in parts)

    def landscape(self) -> Landscape:
        return Landscape(self.space, self.probes, self.levels)


def plans_of(space: SearchSpace, count: int, seed: int = 0) -> list[Plan]:
    rng = random.Random(seed)
    return [space.project([rng.random() * 2 * space.rate for _ in space.dials]) for _ in range(count)]


def moved(plan: Plan, block: int, level: int) -> Plan:
    return Plan((*plan.levels[:block], level, *plan.levels[block + 1 :]))


def middle(space: SearchSpace) -> Plan:
    return Plan(tuple(len(block.options) // 2 for block in space.blocks))


def told(landscape: Landscape, pairs: Sequence[tuple[Plan, Plan, float]], windows: Sequence[str], generation: int = 0) -> Landscape:
    for (plan, reference, change), window in zip(pairs, windows, strict=True):
        landscape.observe(plan, change, Reference(reference, 1.0, window, TOKENS, 0))
    landscape.fit(generation)
    return landscape


# -- learning ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_a_sum_over_blocks_is_recovered_from_noisy_differences(seed: int) -> None:
    space = space_of(layers=6, rate=0.3, bias=True, seed=seed)
    world = World(space, seed)
    prior, landscape = world.landscape(), world.landscape()
    for generation in range(8):
        reference, *children = plans_of(space, 10, seed=100 * seed + generation)
        window = f"g{generation}"
        for child in children:
            change = world.kl(child, window) - world.kl(reference, window)
            landscape.observe(child, change, Reference(reference, 1.0, window, TOKENS, generation))
        landscape.fit(generation)
    unseen = plans_of(space, 40, seed=99)
    true = np.array([world.kl(plan) - world.kl(unseen[0]) for plan in unseen])

    def error(of: Landscape) -> float:
        return float(np.sqrt(np.mean((np.array([of.change(plan, unseen[0]) for plan in unseen]) - true) ** 2)))

    assert error(landscape) < 0.6 * error(prior)
    before, after = (world.kl(cheapest(space, of.losses())) for of in (prior, landscape))
    assert after < before, "the best plan by what was learnt is better than the best plan by the probes"


def test_with_nothing_learnt_the_probes_decide() -> None:
    space = space_of(layers=3, rate=0.3)
    world = World(space)
    landscape = world.landscape()
    landscape.fit(0)
    plan = plans_of(space, 1)[0]
    landscape.observe(plan, 0.0, Reference(plan, 1.0, "w", TOKENS, 0))
    assert landscape.differences == [], "a plan does not differ from itself"
    landscape.fit(3)
    losses, expected = landscape.losses(), predicted_losses(space, world.probes, world.levels)
    assert [value for curve in losses for value in curve] == pytest.approx([value for curve in expected for value in curve])
    for other in plans_of(space, 5, seed=1):
        change = sum(a[i] - a[j] for a, i, j in zip(losses, other.levels, plan.levels, strict=True))
        assert landscape.change(other, plan) == pytest.approx(change)
        assert landscape.change(plan, other) == pytest.approx(-change)
    assert cheapest(space, landscape.losses()) == cheapest(space, expected)


def test_many_differences_on_one_window_are_not_many_windows() -> None:
    space = space_of(layers=4, rate=0.3)
    here = middle(space)
    ffn = next(index for index, block in enumerate(space.blocks) if block.kind == "ffn")
    there = moved(here, ffn, here.levels[ffn] + 2)

    def believed(windows: Sequence[str]) -> float:
        landscape = World(space).landscape()
        change = 3 * landscape.change(there, here)
        told(landscape, [(there, here, change)] * len(windows), windows)
        return landscape.change(there, here) / change

    once, repeated, fresh = believed(["a"]), believed(["a"] * 12), believed([f"w{n}" for n in range(12)])
    assert 1 / 3 < once <= repeated < fresh < 1
    assert repeated - once < 0.35 * (fresh - once)


def test_few_tokens_and_old_differences_say_less() -> None:
    space = space_of(layers=4, rate=0.3)
    here = middle(space)
    there = moved(here, 1, here.levels[1] + 2)

    def believed(tokens: int, generation: int) -> float:
        landscape = World(space).landscape()
        change = 3 * landscape.change(there, here)
        landscape.observe(there, change, Reference(here, 1.0, "w", tokens, 0))
        landscape.fit(generation)
        return landscape.change(there, here) / change

    assert believed(512, 0) < believed(4096, 0) < believed(32_768, 0)
    assert believed(4096, 12) < believed(4096, 3) < believed(4096, 0)


def test_attention_shapes_speak_for_themselves() -> None:
    """Widths of an FFN nest, so what one costs says much about the next; the heads of two attention shapes need not nest."""
    space = space_of(layers=2, kv_groups=3, heads_per_group=3, channels=192, rate=0.3)
    here = space.dense

    def open_still(kind: str) -> float:
        """How uncertain the next level still is, as a share of its loss, once one level is known well."""
        block = next(index for index, b in enumerate(space.blocks) if b.kind == kind and len(b.options) > 3)
        landscape = World(space).landscape()
        known = landscape.losses()[block][2]
        told(landscape, [(moved(here, block, 2), here, known)] * 40, [f"w{n}" for n in range(40)])
        rng = random.Random(0)
        drawn = np.array([landscape.losses(rng)[block] for _ in range(200)])
        assert drawn[:, 2].std() < 0.15 * known
        return float(drawn[:, 3].std() / drawn[:, 3].mean())

    assert open_still("attention") > 1.2 * open_still("ffn")


def test_a_smaller_shape_may_be_the_better_one() -> None:
    space = space_of(layers=2, kv_groups=3, heads_per_group=3, channels=192, rate=0.3)
    landscape, here = World(space).landscape(), space.dense
    before = landscape.losses()[0]
    pairs = [(moved(here, 0, 2), here, 3 * before[2]), (moved(here, 0, 3), here, 0.5 * before[3])]
    told(landscape, pairs * 4, [window for window in "abcd" for _ in range(2)])
    losses = landscape.losses()
    assert losses[0][3] < losses[0][2]
    assert cheapest(space, losses).levels[0] != 2


# -- asking ----------------------------------------------------------------------------------------------------------------
def taught(space: SearchSpace) -> Landscape:
    world = World(space, 1)
    reference, *others = plans_of(space, 7)
    pairs = [(plan, reference, world.kl(plan) - world.kl(reference)) for plan in others]
    return told(world.landscape(), pairs, ["a", "a", "b", "b", "c", "c"])


def draws_of(landscape: Landscape, count: int) -> np.ndarray:
    rng = random.Random(0)
    return np.array([[value for curve in landscape.losses(rng) for value in curve] for _ in range(count)])


def test_draws_have_the_mean_and_less_spread_than_before() -> None:
    space = space_of(layers=2, rate=0.3, channels=64)
    landscape, prior = taught(space), World(space, 1).landscape()
    draws, free = draws_of(landscape, 500), draws_of(prior, 500)
    mean = np.array([value for curve in landscape.losses() for value in curve])
    spread = draws.std(0)
    assert (np.abs(draws.mean(0) - mean) <= 4.5 * spread / np.sqrt(len(draws)) + 1e-12).all()
    assert spread.sum() < 0.8 * free.std(0).sum()
    assert (draws[:, 0] == 0).all(), "what is not pruned costs nothing, for sure"


def test_equal_seeds_equal_draws() -> None:
    landscape = taught(space_of(layers=2, rate=0.3, channels=64))
    assert landscape.losses(random.Random(3)) == landscape.losses(random.Random(3))
    assert landscape.losses(random.Random(3)) != landscape.losses(random.Random(4))


def test_levels_far_from_the_plan_are_forbidden() -> None:
    space = space_of(layers=3, rate=0.3)
    landscape, here = World(space).landscape(), middle(space)
    free = landscape.losses()
    for index, curve in enumerate(landscape.losses(around=here, radius=0.1)):
        block, level_here = space.blocks[index], here.levels[index]
        for level, value in enumerate(curve):
            near = abs(level - level_here) <= 1 or abs(block.rate(level) - block.rate(level_here)) <= 0.1
            assert value == (free[index][level] if near else FORBIDDEN)


def test_known_levels_are_open_however_far() -> None:
    space = space_of(layers=3, rate=0.3, channels=256)
    landscape, here = World(space).landscape(), middle(space)
    last = len(space.blocks[1].options) - 1
    assert landscape.losses(around=here, radius=0.1, known=True) == landscape.losses(around=here, radius=0.1)
    told(landscape, [(moved(here, 1, last), here, 0.5)], ["w0"])
    bounded, opened = (landscape.losses(around=here, radius=0.1, known=known) for known in (False, True))
    assert bounded[1][last] == FORBIDDEN
    assert opened[1][last] == landscape.losses()[1][last]
    assert [curve for index, curve in enumerate(opened) if index != 1] == [c for index, c in enumerate(bounded) if index != 1]
    assert opened[1][:last] == bounded[1][:last]


def test_exchanges_point_at_what_is_sensitive() -> None:
    space = space_of(layers=3, mode="none", channels=96, rate=0.3)
    ffn = [index for index, block in enumerate(space.blocks) if block.kind == "ffn"]
    levels = [2 if index in ffn else 0 for index in range(len(space.blocks))]
    landscape = Landscape(space, [{1: 0.5, 3: 0.1, 5: 0.02}.get(index, 0.0) for index in range(6)], levels)
    here = moved(middle(space), 5, 0)  # the last block is whole and cannot grow
    exchanges = dict(landscape.exchanges(here))
    assert sorted(exchanges) == [1, 3]
    assert exchanges[1] < exchanges[3]
    assert exchanges[1] < 0, "it pays to keep more of the most sensitive block"
    assert landscape.exchanges(Plan(tuple(len(block.options) - 1 for block in space.blocks))) == []
    # What is measured changes the advice: keeping more of the other block turns out to pay.
    there = moved(here, 3, here.levels[3] - 1)
    told(landscape, [(there, here, -1.0)] * 6, [f"w{n}" for n in range(6)])
    after = dict(landscape.exchanges(here))
    assert exchanges[3] > 0
    assert after[3] < 0


@pytest.mark.parametrize("levels", [2, 3, 5, 1000])
def test_the_rank_correlation_is_scipys_with_ties_too(levels: int) -> None:
    rng = random.Random(levels)
    for count in (2, 3, 8, 50):
        first, second = ([0, 1, *(rng.randrange(levels) for _ in range(count - 2))] for _ in range(2))
        rng.shuffle(second)
        assert spearman(first, second) == pytest.approx(float(stats.spearmanr(first, second).statistic), abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, float("nan")], [1.0, 2.0])])
def test_without_an_order_there_is_no_rank_correlation(first: list[float], second: list[float]) -> None:
    assert spearman(first, second) is None
