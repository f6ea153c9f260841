"""Slopes against finite differences and against the engine's own scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from selfpruner.architectures import FfnWeights
from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.slopes import slopes
from selfpruner.planning.space import Plan
from selfpruner.testing.prepared_models import ready
from selfpruner.testing.tiny_models import load_tiny, tokens_of
from tests.helpers.pruned import random_plans

EPSILON = 1e-3


class Shaken:
    """A block with two more levels: the weights of its output matrix at ``level`` times 1 + EPSILON noise and times 1 - EPSILON
    noise. A common factor would say nothing of a block with a norm behind it."""

    def __init__(self, block: Any, level: int) -> None:
        self.block, self.level = block, level
        self.options = (*block.options, block.options[level], block.options[level])
        self.own_bytes = block.own_bytes

    def weights(self, level: int) -> Any:
        if level < len(self.block.options):
            return self.block.weights(level)
        weights = self.block.weights(self.level)
        size = EPSILON if level == len(self.block.options) else -EPSILON
        parts = ("down", "down_bias") if isinstance(weights, FfnWeights) else ("o", "o_bias")
        found = {part: getattr(weights, part) for part in parts}
        return replace(
            weights, **{part: None if value is None else value * (1 + size * noise(value)) for part, value in found.items()}
        )

    def columns(self, level: int) -> Any:
        return self.block.columns(level if level < len(self.block.options) else self.level)

    @staticmethod
    def renewed(level: int, weights: Any) -> Any:  # noqa: ARG004
        return weights


def noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "opt", "gemma2"])
def test_first_terms_are_derivatives(family: str) -> None:
    case = ready(load_tiny(family, kv_heads=2))
    plan = random_plans(case.space, 1)[0]
    tokens = tokens_of(3, 20, seed=5)
    engine = case.engine
    plain = [len(block.options) for block in engine.blocks]
    engine.blocks = [Shaken(block, level) for block, level in zip(engine.blocks, plan.levels, strict=True)]  # type: ignore[misc]
    moves = [(block, count) for block, count in enumerate(plain)]
    found = slopes(engine, plan, moves, tokens)
    ways = [[Plan((*plan.levels[:b], count + way, *plan.levels[b + 1 :])) for b, count in enumerate(plain)] for way in (0, 1)]
    up, down = ([score.kl for score in engine.evaluate(plans, tokens)] for plans in ways)
    assert found.kl == pytest.approx(engine.evaluate([plan], tokens)[0].kl, rel=1e-4)
    assert found.tokens == tokens.numel()
    largest = max(abs(value) for value in found.first)
    for value, more, less in zip(found.first, up, down, strict=True):
        assert value == pytest.approx((more - less) / 2, rel=0.02, abs=0.01 * largest)
    assert all(0 < size < 1e-4 for size in found.size), "a thousandth of the output is a millionth of its energy, or less"


def test_batches_do_not_matter_and_nothing_moved_is_nothing() -> None:
    case = ready(load_tiny("llama"))
    plan = random_plans(case.space, 1)[0]
    tokens = tokens_of(4, 16, seed=2)
    moves = [(block, level) for block, here in enumerate(plan.levels) for level in {here, 0, len(case.blocks[block].options) - 1}]
    whole = slopes(case.engine, plan, moves, tokens)
    case.engine.survey_bytes = 1
    parts = slopes(case.engine, plan, moves, tokens)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5)
    assert parts.first == pytest.approx(whole.first, rel=1e-3, abs=1e-6)
    assert parts.size == pytest.approx(whole.size, rel=1e-4)
    for (block, level), first, size in zip(moves, whole.first, whole.size, strict=True):
        if level == plan.levels[block]:
            assert (first, size) == pytest.approx((0, 0), abs=1e-7)
        else:
            assert size > 0


def test_cancelling_stops_it() -> None:
    case = ready(load_tiny("llama"))
    with pytest.raises(CancelledTaskError):
        slopes(case.engine, case.space.dense, [], tokens_of(1, 8), cancelled=lambda: True)
