"""The bandit: who gets how many children, and what changes that."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise

import pytest

from selfpruner.evolution.bandit import FLOOR_EVERY, Bandit

NAMES = ("reallocate", "level_switch", "recombine", "mutate")


def play(
    bandit: Bandit,
    generations: int,
    *,
    gains: Mapping[str, float] | None = None,
    thinking: Mapping[str, float] | None = None,
    count: int = 12,
    start: int = 1,
) -> list[dict[str, int]]:
    """Generations in which a child takes a second to score; ``gains`` per generation asked, ``thinking`` seconds per question."""
    history = []
    for generation in range(start, start + generations):
        shares = bandit.shares(count, generation)
        history.append(dict(shares))
        asked = {name for name, share in shares.items() if share}
        bandit.reward(
            {name: gain for name, gain in (gains or {}).items() if name in asked},
            {name: float(share) for name, share in shares.items()},
            {name: seconds for name, seconds in (thinking or {}).items() if name in asked},
            shares,
        )
    return history


def whole(history: list[dict[str, int]], name: str) -> int:
    return sum(shares[name] for shares in history)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 100])
@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], NAMES])
def test_shares_are_whole_and_sum_up(count: int, names: tuple[str, ...]) -> None:
    rng = random.Random(count)
    bandit = Bandit(names)
    for generation in range(1, 40):
        shares = bandit.shares(count, generation)
        assert set(shares) == set(names)
        assert sum(shares.values()) == count
        assert all(share >= 0 for share in shares.values())
        drawn = {name: rng.random() * 0.01 for name in names}, {name: rng.random() * 30 for name in names}
        bandit.reward(*drawn, {"mutate": rng.random() * 60}, shares)


def test_it_starts_even() -> None:
    assert set(Bandit(NAMES).shares(12, 1).values()) == {3}


def test_who_is_free_to_ask_is_always_asked() -> None:
    history = play(Bandit(NAMES), 30, gains={"reallocate": 0.05})
    assert all(min(shares.values()) >= 1 for shares in history)


def test_gains_shift_the_shares_and_old_ones_fade() -> None:
    bandit = Bandit(NAMES)
    first = play(bandit, 10, gains={"reallocate": 0.03, "recombine": 0.001})
    assert first[-1]["reallocate"] >= 2 * max(first[-1][name] for name in NAMES[1:])
    second = play(bandit, 12, gains={"recombine": 0.03}, start=11)
    assert second[-1]["recombine"] > second[-1]["reallocate"]


def test_gain_per_second_counts_not_gain() -> None:
    """Both improve by the same; one thinks for a minute each time."""
    history = play(Bandit(("quick", "slow")), 20, gains={"quick": 0.01, "slow": 0.01}, thinking={"slow": 60.0})
    assert whole(history[5:], "quick") > 3 * whole(history[5:], "slow")


def test_a_slow_arm_that_brings_nothing_is_asked_ever_more_rarely() -> None:
    history = play(Bandit(NAMES), 61, gains={"reallocate": 0.01, "level_switch": 0.005}, thinking={"mutate": 120.0})
    asked = [number for number, shares in enumerate(history) if shares["mutate"]]
    assert [after - before for before, after in pairwise(asked)] == [2 * FLOOR_EVERY, 4 * FLOOR_EVERY, 8 * FLOOR_EVERY]
    assert all(history[number]["mutate"] == 1 for number in asked[1:])


def test_a_slow_arm_that_gains_little_keeps_its_floor() -> None:
    gains = {"reallocate": 0.01, "level_switch": 0.005, "mutate": 1e-4}
    history = play(Bandit(NAMES), 41, gains=gains, thinking={"mutate": 120.0})
    asked = [number for number, shares in enumerate(history) if shares["mutate"]]
    assert {after - before for before, after in pairwise(asked)} == {FLOOR_EVERY}


def test_a_slow_arm_that_earns_its_seconds_is_asked() -> None:
    history = play(Bandit(NAMES), 20, gains={"mutate": 0.2, "level_switch": 0.001}, thinking={"mutate": 30.0})
    assert whole(history[5:], "mutate") > whole(history[5:], "level_switch")


def test_arms_asked_least_get_a_bonus() -> None:
    bandit = Bandit(("often", "seldom"))
    bandit.reward({}, {}, {}, {"often": 50, "seldom": 1})
    assert bandit.value("seldom") > bandit.value("often")


def test_the_same_history_the_same_shares() -> None:
    rng = random.Random(1)
    gains = {name: rng.random() * 0.02 for name in NAMES}
    assert play(Bandit(NAMES), 25, gains=gains) == play(Bandit(NAMES), 25, gains=gains)
