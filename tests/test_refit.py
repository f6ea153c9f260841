"""Refitting a plan: the algebra against plain least squares, and what it is worth on a pruned model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selfpruner.architectures import AttentionWeights
from selfpruner.compensation.refit import Moments, Refit, fit, refitted
from selfpruner.errors import CancelledTaskError
from selfpruner.space import Plan
from tests.pruned import Ready, load_tiny, ready, tokens_of


def moments_of(z: torch.Tensor, t: torch.Tensor) -> Moments:
    found = Moments(z.shape[1], t.shape[1], z.device)
    for part in zip(z.split(7), t.split(7), strict=True):
        found.add(*part, torch.ones(len(part[0])))
    return found


def sample(tokens: int = 400, n: int = 10, d: int = 6, noise: float = 0.1) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(tokens, n, generator=g) @ torch.randn(n, n, generator=g) + 2
    true = torch.randn(d, n, generator=g)
    t = z @ true.T + 3 + noise * torch.randn(tokens, d, generator=g)
    return z, t, true, true + 0.3 * torch.randn(d, n, generator=g)


def test_errors_and_biases_are_those_of_the_rows() -> None:
    z, t, _, W = sample()
    moments = moments_of(z, t)
    bias = torch.linspace(-1, 1, 6).double()
    assert moments.error(W.double(), bias) == pytest.approx(float((z.double() @ W.double().T + bias - t).pow(2).sum()), rel=1e-4)
    best = moments.bias(W.double())
    torch.testing.assert_close(best, (t - z @ W.T).double().mean(0), rtol=1e-4, atol=1e-4)
    both = moments_of(z[:100], t[:100]) + moments_of(z[100:], t[100:])
    torch.testing.assert_close(both.zz, moments.zz, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("biased", [True, False])
def test_the_fit_finds_what_is_there(biased: bool) -> None:
    z, t, true, W = sample()
    if not biased:
        t = t - 3
    halves = moments_of(z[:300], t[:300]), moments_of(z[300:], t[300:])
    found, bias, error = fit(*halves, W, torch.zeros(6) if biased else None)
    assert error < 0.1
    assert float((found - true).norm()) < 0.2 * float((W - true).norm())
    if biased:
        assert bias is not None
        torch.testing.assert_close(bias, torch.full((6,), 3.0), rtol=0.1, atol=0.1)
    else:
        assert bias is None


def test_what_cannot_be_learnt_is_left_alone() -> None:
    """Targets that have nothing to do with the inputs beyond what the given weights say."""
    g = torch.Generator().manual_seed(1)
    z, W = torch.randn(60, 50, generator=g), torch.randn(4, 50, generator=g)
    t = z @ W.T + torch.randn(60, 4, generator=g) * 5
    found, bias, error = fit(moments_of(z[:45], t[:45]), moments_of(z[45:], t[45:]), W, torch.zeros(4))
    assert bias is not None
    assert (error == 1.0 and torch.equal(found, W)) or error < 1.0


@pytest.fixture(scope="module")
def case() -> Ready:
    return ready(load_tiny("llama", layers=4, ffn=96), rate=0.3, calibration=tokens_of(48, 32, seed=7))


def blocks_of(case: Ready, plan: Plan) -> tuple[Any, Any]:
    return (lambda index: case.engine.weights(index, 0)), (lambda index: case.engine.weights(index, plan.levels[index]))


def final(case: Ready, weights: list[Any], tokens: torch.Tensor) -> torch.Tensor:
    x, rope = case.arch.embed(tokens), case.arch.rope(tokens.shape[1])
    for index, block in enumerate(weights):
        if isinstance(block, AttentionWeights):
            x = case.arch.attend(index // 2, x, block, rope)
        else:
            x = case.arch.feed_forward(index // 2, x, block)
    return case.arch.final_norm(x)


def shape_of(weights: Any) -> torch.Size:
    return (weights.o if isinstance(weights, AttentionWeights) else weights.down).shape  # type: ignore[no-any-return]


@pytest.mark.parametrize("inputs", [False, True])
def test_the_pruned_model_comes_nearer_to_the_dense_one(case: Ready, inputs: bool) -> None:
    plan = case.space.project([0.3] * case.space.layers)
    dense, pruned = blocks_of(case, plan)
    before = [pruned(index) for index in range(8)]
    after = refitted(case.arch, case.calibration, dense, pruned, inputs=inputs)
    assert [shape_of(weights) for weights in before] == [shape_of(weights) for weights in after]
    unseen = tokens_of(16, 32, seed=99)
    with torch.no_grad():
        target = final(case, [dense(index) for index in range(8)], unseen)
        errors = [float((final(case, weights, unseen) - target).pow(2).mean()) for weights in (before, after)]
    assert errors[1] < errors[0]


def test_a_dense_plan_stays_dense(case: Ready) -> None:
    dense, _ = blocks_of(case, case.space.dense)
    walk = Refit(case.arch, case.calibration[:8])
    for index in range(8):
        found = walk.block(index, dense(index), dense(index))
        own = dense(index)
        name = "o" if isinstance(own, AttentionWeights) else "down"
        torch.testing.assert_close(getattr(found, name), getattr(own, name), rtol=1e-3, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(walk.dense, walk.pruned, strict=True))


def test_cancelling_stops_between_blocks(case: Ready) -> None:
    dense, pruned = blocks_of(case, case.space.dense)
    with pytest.raises(CancelledTaskError):
        refitted(case.arch, case.calibration[:4], dense, pruned, cancelled=lambda: True)
