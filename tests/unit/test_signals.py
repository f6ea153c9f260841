"""Signals of the dense model, and the allocations made from them on real (tiny) layers."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from selfpruner.architectures.order import checkpoint_ffn
from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.criteria.base import Evidence, Heads, Matrix
from selfpruner.criteria.flap import Flap
from selfpruner.errors import CancelledTaskError
from selfpruner.operators import CLASSICAL, Context
from selfpruner.operators.allocation import below_threshold
from selfpruner.planning.space import Plan
from selfpruner.pruning.signals import (
    channel_scores,
    gather,
    head_scores,
    hill_exponent,
    layer_facts,
    layer_signals,
    level_thresholds,
    outlier_ratio,
    spectral_exponents,
)
from selfpruner.testing.prepared_models import Ready, ready
from selfpruner.testing.tiny_models import load_tiny


@pytest.fixture(scope="module")
def case() -> Ready:
    return ready(load_tiny("llama", layers=4, ffn=96))


def signals_of(case: Ready) -> dict[str, list[float]]:
    options = [block.options for block in case.space.blocks]
    layers = [
        layer_signals(layer_facts(case.arch, layer, statistics), (options[2 * layer], options[2 * layer + 1]))
        for layer, statistics in enumerate(case.statistics)
    ]
    return gather(layers)


def plan_of(name: str, case: Ready, signals: dict[str, list[float]]) -> Plan:
    context = Context(case.space, 0, 0, signals=signals)
    return asyncio.run(CLASSICAL[name]().propose(context, 1, random.Random(0)))[0].plan


@pytest.mark.parametrize("exponent", [1.5, 2.5, 4.0])
def test_the_exponent_of_a_spectrum_that_is_a_power_law(exponent: float) -> None:
    """Eigenvalues drawn from a density ~ l^-a above 1: Hill's estimator finds a."""
    g = torch.Generator().manual_seed(0)
    values = (1 - torch.rand(600, generator=g, dtype=torch.float64)).pow(-1 / (exponent - 1))
    Q = torch.linalg.qr(torch.randn(600, 600, generator=g, dtype=torch.float64))[0]
    P = torch.linalg.qr(torch.randn(700, 600, generator=g, dtype=torch.float64))[0]
    W = (Q * values.sqrt()) @ P.T
    assert hill_exponent(W) == pytest.approx(exponent, rel=0.2)
    assert hill_exponent(W.T * 30) == pytest.approx(hill_exponent(W), rel=1e-6), "scale and side do not matter"


def test_matrices_without_a_spectrum() -> None:
    assert hill_exponent(torch.zeros(4, 6)) == 1.0
    assert hill_exponent(torch.eye(8)) == 1.0


def test_exponents_are_found_once(tmp_path: Path, case: Ready) -> None:
    file = tmp_path / "spectra" / "model.json"
    found = spectral_exponents(case.arch, file)
    assert len(found) == case.arch.layers
    assert all(value > 1 for value in found)
    assert spectral_exponents(case.arch, file, lambda: True) == found
    with pytest.raises(CancelledTaskError):
        spectral_exponents(case.arch, tmp_path / "other.json", lambda: True)


def test_outlier_ratio_counts_over_all_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    W = [torch.randn(6, 8, generator=generator), torch.randn(6, 20, generator=generator)]
    norms = [torch.rand(8, generator=generator), torch.rand(20, generator=generator)]
    norms[1][3] = 40.0
    scores = [
        abs(float(w[i, j])) * float(norm[j]) for w, norm in zip(W, norms, strict=True) for i in range(6) for j in range(len(norm))
    ]
    mean = sum(scores) / len(scores)
    matrices = [Matrix("down", w, measured(norm)) for w, norm in zip(W, norms, strict=True)]
    assert outlier_ratio(matrices) == sum(score > 5 * mean for score in scores) / len(scores) > 0
    assert outlier_ratio(matrices, m=1000) == 0.0


def measured(norm: torch.Tensor) -> BlockStatistics:
    """Statistics of one sequence whose inputs have these norms."""
    return BlockStatistics(1, 1, norm, norm, norm.square(), torch.diag(norm))


def test_a_level_is_reached_where_that_many_units_lie_above_the_threshold() -> None:
    scores = torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    kept = [40, 32, 24, 8, 1, 0]
    thresholds = level_thresholds(scores, kept)
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < float(scores.min())
    for count, threshold in zip(kept[1:], thresholds[1:], strict=True):
        assert int((scores > threshold + 1e-5).sum()) == count


def test_scores_are_flaps_standardised_over_the_block(case: Ready) -> None:
    attention, ffn = case.statistics[1]
    W = checkpoint_ffn(case.arch, 1).down.float()
    channels = channel_scores(W, ffn)
    assert float(channels.mean()) == pytest.approx(0, abs=1e-5)
    assert float(channels.std()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(channels.argsort(descending=True, stable=True), Flap().order_channels(Evidence(W, ffn, {})))
    heads = Heads(case.arch.kv_groups, case.arch.heads_per_group, case.arch.head_dim)
    W = case.arch.attention(1).o.float()
    expected = Flap().score_heads(Flap().score_columns(Evidence(W, attention, {})), heads).flatten()
    assert torch.equal(head_scores(W, attention, heads).argsort(), expected.argsort())


def test_signals_have_one_entry_per_layer_and_block(case: Ready) -> None:
    signals = signals_of(case)
    assert len(signals["outlier_ratio"]) == 4
    assert [len(levels) for levels in signals["flap_thresholds"]] == [len(block.options) for block in case.space.blocks]  # type: ignore[arg-type]


def test_the_global_threshold_is_that_of_all_units_sorted(case: Ready) -> None:
    """FLAP by hand: all units, weighted by their parameters, the lowest go until the target is met."""
    units = []
    for index, block in enumerate(case.space.blocks):
        facts = layer_facts(case.arch, index // 2, case.statistics[index // 2])
        scores = facts["channel_scores" if block.kind == "ffn" else "head_scores"]
        units += [(score, index, block.options[0].parameters / len(scores)) for score in scores]
    gone, lowest = [0.0] * len(case.space.blocks), 0.0
    for _, index, size in sorted(units):
        if lowest >= case.space.target:
            break
        gone[index] += size
        lowest += size
    plan = below_threshold(case.space, signals_of(case)["flap_thresholds"])  # type: ignore[arg-type]
    assert case.space.removed(plan) == pytest.approx(case.space.target, abs=2 * case.space.step)
    for index, block in enumerate(case.space.blocks):
        coarse = max(a.parameters - b.parameters for a, b in zip(block.options, block.options[1:], strict=False))
        assert block.removed(plan.levels[index]) == pytest.approx(gone[index], abs=1.5 * coarse)


def test_a_layer_full_of_outliers_keeps_most() -> None:
    model = load_tiny("llama", layers=4, ffn=96, seed=3)
    model.model.layers[2].mlp.down_proj.weight[:, ::12] *= 8
    model.model.layers[2].self_attn.o_proj.weight[:, ::12] *= 8
    case = ready(model, rate=0.3)
    signals = signals_of(case)
    assert signals["outlier_ratio"].index(max(signals["outlier_ratio"])) == 2
    plan = plan_of("owl", case, signals)
    assert case.space.meets_budget(plan)
    rates = case.space.layer_rates(plan)
    assert rates.index(min(rates)) == 2


def test_both_allocations_meet_the_budget(case: Ready) -> None:
    for name in ("owl", "flap_global"):
        plan = plan_of(name, case, signals_of(case))
        assert case.space.meets_budget(plan)
        assert plan != case.space.project([case.space.rate] * case.space.layers)
