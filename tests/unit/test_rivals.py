"""The ways of scoring that the engine is measured against give the same divergences and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import rivals
from benchmarks.engine import children_of
from selfpruner.testing.prepared_models import ready
from selfpruner.testing.tiny_models import load_tiny, tokens_of
from tests.helpers.pruned import random_plans


@pytest.mark.parametrize("options", [{"kv_heads": 2}, {"kv_heads": 4, "attention_bias": True, "mlp_bias": True}])
def test_rivals_agree_with_the_engine(options: dict[str, Any]) -> None:
    case = ready(load_tiny("llama", **options))
    tokens = tokens_of(3, 24)
    before = case.model(tokens).logits
    plans = [*random_plans(case.space, 4), *children_of(case.space, case.space.project([0.2] * case.space.layers), 3, seed=0)]
    expected = [score.kl for score in case.engine.evaluate(plans, tokens)]
    assert min(expected) > 0
    assert rivals.naive(case.arch, case.blocks, case.space, plans, tokens) == pytest.approx(expected, rel=1e-3)
    assert rivals.masked(case.arch, case.blocks, plans, tokens) == pytest.approx(expected, rel=1e-3)
    assert torch.equal(case.model(tokens).logits, before)


def test_children() -> None:
    case = ready(load_tiny("llama"))
    parent = case.space.project([0.2] * case.space.layers)
    children = children_of(case.space, parent, 6, seed=3)
    assert children == children_of(case.space, parent, 6, seed=3)
    assert len(set(children)) == 6
    assert parent not in children
    assert all(child.levels[:2] == parent.levels[:2] for child in children_of(case.space, parent, 3, seed=3, first=2))
    assert all(case.space.meets_budget(child) for child in children)
