"""Races drop the plans that lose, keep the ones that win, and say what the dropped would have come to."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from selfpruner.errors import ConfigError
from selfpruner.evaluation.engine import Engine
from selfpruner.evaluation.race import LEAST_SAMPLES, SEGMENT, Race, quantile
from selfpruner.jobs.handler import _scores
from selfpruner.planning.space import Plan
from selfpruner.testing.prepared_models import Ready, ready
from selfpruner.testing.tiny_models import load_tiny, tokens_of
from selfpruner.workers.tasks import EvaluateRequest, RaceTerms


@pytest.fixture(scope="module")
def case() -> Ready:
    return ready(load_tiny("llama"))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return tokens_of(24, 64, seed=5)


def ladder(case: Ready) -> list[Plan]:
    """Plans from mild to hard: the FFN of the last layer at one level after another, then everything at its smallest."""
    plans = [Plan((0, 0, 0, 0, 0, level)) for level in (1, 2, 3, 4, 5, 6)]
    return [*plans, Plan(tuple(len(block.options) - 1 for block in case.blocks))]


@pytest.mark.parametrize(
    ("confidence", "freedom", "expected"),
    [(0.95, 7, 1.8946), (0.95, 15, 1.7531), (0.99, 7, 2.9980), (0.99, 31, 2.4528), (0.999, 10, 4.1437), (0.9, 1000, 1.2824)],
)
def test_students_quantiles(confidence: float, freedom: int, expected: float) -> None:
    assert quantile(confidence, freedom) == pytest.approx(expected, rel=2e-2)


def test_losers() -> None:
    g = np.random.default_rng(0)
    text = g.random(32) * 10  # what the text does to all plans alike
    quiet = g.standard_normal((5, 32)) * 0.01
    samples = text + quiet + np.array([0.0, 0.1, 0.1005, 0.5, math.nan])[:, None]
    assert Race(2, (0, 1, 2, 3, 4), 0.99).losers(samples, 64) == [3, 4], "0.1005 and 0.1 cannot be told apart"
    assert Race(5, (0, 1, 2, 3, 4)).losers(samples, 64) == []
    assert Race(2, (0, 1, 2, 3, 4)).losers(samples[:, : LEAST_SAMPLES - 1], 64) == []
    assert sorted(Race(1, (0, 1, 2, 3, 4)).losers(samples, 64)) == [1, 2, 3, 4]
    close = np.stack((text, text + 0.2 + 0.6 * np.tile([1.0, -1.0], 16)))
    assert Race(1, (0, 1)).losers(close, 1000) == [], "the rest of a long text may turn it round"
    assert Race(1, (0, 1)).losers(close, 33) == [1], "the rest of this one hardly"
    assert Race(1, (0, 1)).losers(np.full((2, 16), math.nan), 64) == [], "nobody to lose to"


def test_decisions_fall_after_a_first_part_and_every_step() -> None:
    assert Race(1, (0,)).decisions(16, 256) == [4, 6, 8, 10, 12, 14]
    assert Race(1, (0,)).decisions(4, 4096) == [1, 2, 3]
    assert Race(1, (0,)).decisions(64, 32) == [32, 48]
    assert Race(1, (0,)).decisions(4, 256) == [], "nobody is dropped once all is read"


@pytest.mark.parametrize("memory", [None, 1])
def test_memory_does_not_decide_who_is_dropped(case: Ready, tokens: torch.Tensor, memory: int | None) -> None:
    race = Race(2, tuple(range(7)))
    engine = Engine(case.arch, case.blocks, stream_bytes=memory)
    one, other = engine.evaluate(ladder(case), tokens, race=race), case.engine.evaluate(ladder(case), tokens, race=race)
    assert [score.tokens for score in one] == [score.tokens for score in other]
    assert [score.kl for score in one] == pytest.approx([score.kl for score in other], rel=1e-5)


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"confidence": 1.0}, {"confidence": 0.5}])
def test_no_such_race(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Race(**{"keep": 1, "contenders": (0,), **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("exact", [True, False])
def test_a_race_keeps_the_best_and_estimates_the_rest(case: Ready, tokens: torch.Tensor, exact: bool) -> None:
    plans = ladder(case)
    full = case.engine.evaluate(plans, tokens, exact=exact)
    best = sorted(range(len(plans)), key=lambda index: full[index].kl)
    engine = Engine(case.arch, case.blocks)
    raced = engine.evaluate(plans, tokens, exact=exact, race=Race(2, tuple(range(len(plans)))))
    assert [score.rejected for score in raced].count(True) >= 3
    assert sorted(range(len(plans)), key=lambda index: raced[index].kl)[:2] == best[:2]
    for score, whole in zip(raced, full, strict=True):
        if score.rejected:
            assert LEAST_SAMPLES * SEGMENT <= score.tokens < tokens.numel()
            assert score.kl == pytest.approx(whole.kl, rel=0.3)
            assert score.nll == pytest.approx(whole.nll, rel=0.1)
        else:
            assert score.tokens == tokens.numel()
            assert score.kl == pytest.approx(whole.kl, rel=1e-4)
    assert engine.evaluate(plans, tokens, exact=exact, race=Race(2, tuple(range(len(plans))))) == raced, "the same every time"


def test_who_is_no_contender_is_always_scored(case: Ready, tokens: torch.Tensor) -> None:
    plans = ladder(case)
    hardest = len(plans) - 1
    raced = case.engine.evaluate([*plans, plans[3]], tokens, race=Race(1, (0, 1, 2, 3, 4, 5)))
    full = case.engine.evaluate(plans, tokens)
    assert not raced[hardest].rejected, "protected, however bad"
    assert not raced[3].rejected, "also asked for as no contender"
    assert raced[3] == raced[-1]
    assert raced[hardest].kl == pytest.approx(full[hardest].kl, rel=1e-4)
    assert any(score.rejected for score in raced)


def test_a_race_that_is_none(case: Ready, tokens: torch.Tensor) -> None:
    plans = ladder(case)
    full = case.engine.evaluate(plans, tokens)
    assert case.engine.evaluate(plans, tokens, race=Race(len(plans), tuple(range(len(plans))))) == full
    assert case.engine.evaluate(plans, tokens, race=Race(1, (2,))) == full
    assert case.engine.evaluate([], tokens, race=Race(1, ())) == []
    few = case.engine.evaluate(plans, tokens[:2], race=Race(1, tuple(range(len(plans)))))
    assert not any(score.rejected for score in few), "too few samples to decide"


def test_a_race_as_a_task(case: Ready, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker is sent and sends back; the report is exact unless told otherwise, the fitness is not."""
    asked: list[bool] = []
    tally = case.engine.tally

    def watched(*args: Any, exact: bool, **options: Any) -> Any:
        asked.append(exact)
        return tally(*args, exact=exact, **options)

    monkeypatch.setattr(case.engine, "tally", watched)
    prepared: Any = SimpleNamespace(space=case.space, engine=case.engine, tokens=lambda *asked: tokens[list(asked[1])])
    plans = tuple(plan.levels for plan in ladder(case))
    asks = partial(EvaluateRequest, plans=plans, sequences=tuple(range(24)))
    race = RaceTerms(keep=2, contenders=(1, 2, 3, 4, 5, 6), confidence=0.95)
    rows = _scores(prepared, asks(text="fitness", race=race), lambda: False).rows
    assert rows[0].rejected is False
    assert [row.rejected for row in rows].count(True) >= 2
    assert all(row.tokens < tokens.numel() for row in rows if row.rejected)
    for request in (asks(text="report"), asks(text="fitness", exact=True), asks(text="report", exact=False)):
        assert not any(row.rejected for row in _scores(prepared, request, lambda: False).rows)
    assert asked == [False, True, True, False]
    with pytest.raises(ConfigError):
        _scores(prepared, asks(text="fitness", race=RaceTerms(keep=0, contenders=(1,))), lambda: False)
