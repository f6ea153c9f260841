"""What every compensation must do; the errors it reports are those measured on the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfpruner import compensation
from selfpruner.calibration.statistics import JUDGES, Accumulator, BlockStatistics
from selfpruner.compensation import least_squares
from selfpruner.compensation.base import energy, suffix_energies
from selfpruner.compensation.bias import Bias
from selfpruner.compensation.least_squares import (
    FLOOR,
    RIDGE,
    RIDGES,
    LeastSquares,
    LeastSquaresWeights,
    NestedFit,
    covariance,
    held_out_ridge,
    precision,
)
from selfpruner.compensation.none import Nothing, complement
from selfpruner.errors import UnknownNameError
from selfpruner.testing import CompensationSuite
from selfpruner.testing.blocks import Sample, output_error, sample, statistics_of
from selfpruner.testing.compensation_suite import KINDS, order_of


class TestNothing(CompensationSuite):
    compensation = Nothing


class TestBias(CompensationSuite):
    compensation = Bias

    def test_the_bias_is_the_mean_of_what_is_gone(self) -> None:
        block = sample(20)
        order = order_of(20)
        _, bias = Bias().nested(block.W, block.stats, order).weights(8, block.W[:, order])
        assert bias is not None
        expected = block.rows[:, order[8:]].mean(0) @ block.W[:, order[8:]].T
        torch.testing.assert_close(bias.double(), expected, rtol=1e-5, atol=1e-4)

    def test_constant_inputs_are_replaced_exactly(self) -> None:
        block = sample(20)
        gone = [3, 8, 15]
        block.X[..., gone] = torch.tensor([2.0, -1.5, 0.25])
        block = Sample(block.W, block.X, statistics_of(block.X))
        kept = complement(torch.tensor(gone), 20)
        subset = Bias().subset(block.W, block.stats, kept)
        W, bias = subset.weights(kept, block.W)
        dense = block.rows @ block.W.T
        assert bias is not None
        # Kept in float32, like the weights they go into.
        torch.testing.assert_close(block.rows[:, kept] @ W.double().T + bias.double(), dense, rtol=1e-5, atol=1e-4)
        assert subset.error(kept, block.W) <= 1e-9 * energy(block.W, block.stats.gram)


def ridge_of(scatter: Tensor) -> Tensor:
    return RIDGE * scatter + FLOOR * scatter.mean()


class TestLeastSquares(CompensationSuite):
    compensation = LeastSquares

    def ridge(self, block: Sample) -> Tensor:
        return ridge_of(block.stats.variance * (block.stats.tokens - 1))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("ridge", [0.0, RIDGE])
    def test_every_level_equals_a_direct_solve(self, ridge: float, kind: str) -> None:
        block = sample(30, kind=kind)
        order = order_of(30)
        C = covariance(block.stats, ridge)[order][:, order]
        W = block.W[:, order]
        fit = NestedFit.of(W, C)
        for k in range(1, 31):
            direct = torch.linalg.solve(C[:k, :k], C[:k] @ W.T).T
            assert float((fit.Y[:, :k] @ fit.inverse[:k, :k] - direct).abs().max()) <= 1e-8 * max(1.0, float(direct.abs().max()))

    @pytest.mark.parametrize("k", [1, 63, 64, 65, 130, 133, 134, 150, 192, 199, 200])
    def test_few_or_many_columns_gone_the_fit_is_the_same(self, k: int) -> None:
        """The factor is kept in strips of 64 rows here; from two thirds on, the weights are made from what was removed."""
        block = sample(200, kind="correlated", tokens=512)
        order = order_of(200)
        W, C = block.W[:, order], covariance(block.stats)[order][:, order]
        direct = torch.linalg.solve(C[:k, :k], C[:k] @ W.T).T
        repaired, bias = LeastSquares().nested(block.W, block.stats, order).weights(k, W)
        torch.testing.assert_close(repaired.double(), direct, rtol=0, atol=1e-4 * float(direct.abs().max()))
        mean = block.stats.mean[order]
        assert bias is not None
        torch.testing.assert_close(bias.double(), W @ mean - direct @ mean[:k], rtol=0, atol=1e-3)

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_damping_the_tail_energy_is_the_best_error_there_is(self, kind: str) -> None:
        block = sample(30, kind=kind)
        order = order_of(30)
        errors = NestedFit.of(block.W[:, order], block.stats.without_judge().scatter.double()[order][:, order]).errors()
        inputs = torch.cat((block.rows, torch.ones(len(block.rows), 1, dtype=torch.float64)), 1)
        wanted = block.rows @ block.W.T
        for k in (0, 1, 5, 13, 22, 29):
            design = inputs[:, [*order[:k].tolist(), 30]]
            best = torch.linalg.lstsq(design, wanted).solution
            measured = float((wanted - design @ best).pow(2).sum())
            assert float(errors[k]) == pytest.approx(measured, rel=1e-4, abs=1e-7 * float(wanted.pow(2).sum()))

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_level_is_worse_than_bias_and_bias_not_worse_than_nothing(self, kind: str) -> None:
        for seed in range(5):
            block = sample(24, seed=seed, kind=kind)
            order = order_of(24, seed)
            for k in range(1, 24):
                measured = []
                for method in (LeastSquares(), Bias(), Nothing()):
                    W, bias = method.nested(block.W, block.stats, order).weights(k, block.W[:, order])
                    measured.append(output_error(block, W, order[:k], bias))
                assert measured[0] <= measured[1] * (1 + 1e-5) <= measured[2] * (1 + 2e-5)
            for kept in (order[:5].sort().values, order[:18].sort().values):
                measured = []
                for method in (LeastSquares(), Bias(), Nothing()):
                    W, bias = method.subset(block.W, block.stats, kept).weights(kept, block.W)
                    measured.append(output_error(block, W, kept, bias))
                assert measured[0] <= measured[1] * (1 + 1e-5) <= measured[2] * (1 + 2e-5)

    @pytest.mark.parametrize("length", [2, 8, 256])
    def test_the_ridge_is_the_best_one_on_sequences_that_were_not_fitted(self, length: int) -> None:
        g = torch.Generator().manual_seed(length)
        X = (torch.randn(8, length, 12, generator=g) @ torch.randn(12, 24, generator=g)) + torch.randn(8, length, 24, generator=g)
        W = torch.randn(10, 24, generator=g).double()
        judging = torch.arange(8) % JUDGES == JUDGES - 1
        fitted, own = Accumulator(24, X.device), Accumulator(24, X.device)
        fitted.add(X[~judging])
        own.add(X[judging])
        stats = fitted.finish(own)
        kept = torch.arange(0, 24, 2)
        seen, unseen = X[~judging].flatten(0, 1).double(), X[judging].flatten(0, 1).double()
        mean = seen.mean(0)
        scatter = (seen - mean).T @ (seen - mean)
        errors = {}
        for ridge in RIDGES:
            damping = torch.diag(ridge * scatter.diagonal() + FLOOR * scatter.diagonal().mean())
            C = scatter + damping
            found = torch.linalg.solve(C[kept][:, kept], C[kept] @ W.T).T
            bias = W @ mean - found @ mean[kept]
            errors[ridge] = float((unseen @ W.T - unseen[:, kept] @ found.T - bias).pow(2).sum())
        chosen = held_out_ridge(W, stats, kept)
        assert errors[chosen] <= min(errors.values()) * (1 + 1e-4)
        assert (chosen < 0.1) == (length == 256), "much text asks for little ridge, little text for much"
        fit = LeastSquares().subset(W, stats, kept).weights(kept, W)[0]
        wanted = covariance(stats, chosen)
        torch.testing.assert_close(
            fit.double(), torch.linalg.solve(wanted[kept][:, kept], wanted[kept] @ W.T).T, rtol=1e-3, atol=1e-3
        )

    def test_without_sequences_to_judge_the_ridge_is_a_constant(self) -> None:
        block = sample(20)
        assert held_out_ridge(block.W, block.stats, torch.arange(10)) == RIDGE

    def test_a_large_common_offset_costs_no_digits(self) -> None:
        plain = sample(16, kind="white", tokens=4096)
        moved = Sample(plain.W, plain.X + 1000.0, statistics_of(plain.X + 1000.0))
        order = order_of(16)
        for k in (4, 12):
            a, b = (LeastSquares().nested(block.W, block.stats, order).weights(k, block.W[:, order])[0] for block in (plain, moved))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)

    def test_inputs_that_are_all_constant_leave_a_bias(self) -> None:
        X = torch.ones(2, 8, 6) * torch.arange(6.0)
        block = Sample(sample(6).W, X, statistics_of(X))
        W, bias = LeastSquares().nested(block.W, block.stats, order_of(6)).weights(2, block.W[:, order_of(6)])
        assert torch.isfinite(W).all()
        assert output_error(block, W, order_of(6)[:2], bias) <= 1e-8


@pytest.mark.parametrize("seed", range(6))
def test_a_tall_matrix_gets_the_ridge_that_all_its_rows_would_give(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(8, 12 * 2**seed, 20, generator=g) @ torch.randn(20, 48, generator=g)
    X += torch.randn(X.shape, generator=g)
    W, kept = torch.randn(700, 48, generator=g), torch.arange(0, 48, 2)
    judging = torch.arange(8) % JUDGES == JUDGES - 1
    fitted, own = Accumulator(48, X.device), Accumulator(48, X.device)
    fitted.add(X[~judging])
    own.add(X[judging])
    stats = fitted.finish(own)
    found = held_out_ridge(W, stats, kept)
    monkeypatch.setattr(least_squares, "SKETCH", len(W))
    assert found == held_out_ridge(W, stats, kept)


def test_moments_that_rounding_made_indefinite_get_a_larger_ridge() -> None:
    scatter = torch.full((3, 3), -0.6).fill_diagonal_(1.0)
    values = torch.zeros(3, dtype=torch.float64)
    stats = BlockStatistics(100, 1, values, values + 0.01, values + 1, scatter)
    W = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    repaired, _ = LeastSquares().nested(W, stats, torch.arange(3)).weights(3, W)
    torch.testing.assert_close(repaired.double(), W, rtol=0, atol=1e-4)


class TestLeastSquaresWeights(CompensationSuite):
    compensation = LeastSquaresWeights

    def ridge(self, block: Sample) -> Tensor:
        return ridge_of(block.stats.energy)

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_level_is_the_damped_fit_through_the_origin(self, kind: str) -> None:
        block = sample(30, kind=kind)
        order = order_of(30)
        W, rows = block.W[:, order], block.rows[:, order]
        C = rows.T @ rows
        C.diagonal().add_(RIDGE * C.diagonal() + FLOOR * C.diagonal().mean())
        nested = LeastSquaresWeights().nested(block.W, block.stats, order)
        for k in (1, 7, 15, 26):
            direct = torch.linalg.solve(C[:k, :k], C[:k] @ W.T).T
            torch.testing.assert_close(
                nested.weights(k, W)[0].double(), direct, rtol=0, atol=1e-4 * max(1.0, float(direct.abs().max()))
            )

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_error_is_between_nothing_and_a_fit_with_a_bias(self, kind: str) -> None:
        block = sample(24, kind=kind)
        order = order_of(24)
        for k in range(1, 24):
            measured = []
            for method in (LeastSquares(), LeastSquaresWeights(), Nothing()):
                W, bias = method.nested(block.W, block.stats, order).weights(k, block.W[:, order])
                measured.append(output_error(block, W, order[:k], bias))
            # The ridge is a share of other moments, so not of the same size.
            assert measured[0] <= measured[1] * 1.05
            assert measured[1] <= measured[2] * (1 + 1e-5)

    def test_the_ridge_is_judged_without_a_bias(self) -> None:
        g = torch.Generator().manual_seed(3)
        X = torch.randn(8, 64, 24, generator=g) + 2 * torch.randn(24, generator=g)
        judging = torch.arange(8) % JUDGES == JUDGES - 1
        fitted, own = Accumulator(24, X.device), Accumulator(24, X.device)
        fitted.add(X[~judging])
        own.add(X[judging])
        stats = fitted.finish(own)
        W, kept = torch.randn(10, 24, generator=g).double(), torch.arange(0, 24, 2)
        seen, unseen = X[~judging].flatten(0, 1).double(), X[judging].flatten(0, 1).double()
        gram = seen.T @ seen
        errors = {}
        for ridge in RIDGES:
            C = gram + torch.diag(ridge * gram.diagonal() + FLOOR * gram.diagonal().mean())
            found = torch.linalg.solve(C[kept][:, kept], C[kept] @ W.T).T
            errors[ridge] = float((unseen @ W.T - unseen[:, kept] @ found.T).pow(2).sum())
        chosen = min(errors, key=errors.__getitem__)
        whole = X.flatten(0, 1).double()
        C = whole.T @ whole
        C.diagonal().add_(chosen * C.diagonal() + FLOOR * C.diagonal().mean())
        fit, bias = LeastSquaresWeights().subset(W, stats, kept).weights(kept, W)
        assert bias is None
        torch.testing.assert_close(fit.double(), torch.linalg.solve(C[kept][:, kept], C[kept] @ W.T).T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_precision_is_the_inverse_of_the_covariance(kind: str) -> None:
    block = sample(150, kind=kind, tokens=512)  # more columns than are looked at together
    C = covariance(block.stats)
    identity = precision(block.stats).double() @ C
    scale = C.diagonal().sqrt()
    torch.testing.assert_close(scale[:, None] * identity / scale, torch.eye(150).double(), rtol=0, atol=2e-3)


def test_a_constant_input_has_a_precision_of_its_own() -> None:
    X = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(0))
    X[..., 2] = 3.0
    P = precision(statistics_of(X))
    assert bool(P.isfinite().all())
    assert float(P[2].abs().sum() - P[2, 2]) == 0


def test_suffix_energies() -> None:
    block, order = sample(300), order_of(300).flip(0)  # more columns than are looked at together
    W, moment, mean, tokens = block.W[:, order], block.stats.gram, block.stats.mean, block.stats.tokens
    centred = (moment - tokens * torch.outer(mean, mean))[order][:, order]
    expected = [energy(W[:, k:], moment[order][:, order][k:, k:]) for k in range(301)]
    found = suffix_energies(block.W, block.stats.scatter, order, mean, tokens)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    expected = [energy(W[:, k:], centred[k:, k:]) for k in range(301)]
    found = suffix_energies(block.W, block.stats.scatter, order)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_every_compensation_is_what_its_line_says() -> None:
    assert all(cls.name == name for name, cls in compensation.COMPENSATIONS.items())
    suites = {suite.compensation for suite in CompensationSuite.__subclasses__()}
    assert suites == set(compensation.COMPENSATIONS.values()), "every compensation has its suite here"


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match="bias, least_squares, least_squares_weights, none"):
        compensation.create("lsq")
