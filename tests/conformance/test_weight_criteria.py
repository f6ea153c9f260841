"""What every criterion for single weights must do, and what each one's formula says when it is computed anew from the inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from selfpruner import criteria
from selfpruner.compensation.sweep import repaired, sweep
from selfpruner.criteria import Matrix
from selfpruner.criteria.eggs import Eggs, expander_mask
from selfpruner.criteria.gblm import Gblm, GblmL2
from selfpruner.criteria.magnitude import Magnitude
from selfpruner.criteria.masks import Sparsity, keep_n
from selfpruner.criteria.ria import Ria, RiaPermuted, shares
from selfpruner.criteria.sparsegpt import SparseGpt
from selfpruner.criteria.taylor import Taylor
from selfpruner.criteria.wanda import Wanda
from selfpruner.criteria.zpruner import ZPruner, ZPrunerRows
from selfpruner.errors import ConfigError
from selfpruner.testing import WeightCriterionSuite
from selfpruner.testing.blocks import gradients_of, matrix, sample, statistics_of
from tests.helpers.suites import suites_of


class TestMagnitude(WeightCriterionSuite):
    criterion = Magnitude
    formula = staticmethod(lambda W, norm, g: W.abs())  # noqa: ARG005


class TestWanda(WeightCriterionSuite):
    criterion = Wanda
    formula = staticmethod(lambda W, norm, g: W.abs() * norm)  # noqa: ARG005
    by_row = True


class TestTaylor(WeightCriterionSuite):
    criterion = Taylor
    formula = staticmethod(lambda W, norm, g: (W * g.total).abs())  # noqa: ARG005


class TestGblm(WeightCriterionSuite):
    criterion = Gblm
    formula = staticmethod(lambda W, norm, g: W.abs() * (norm + 100 * 128 / 5 * g.absolute))
    by_row = True

    def test_without_gradients_it_is_wanda(self) -> None:
        m = matrix()
        quiet = replace(m, gradients=gradients_of(torch.zeros(5, 24, 32)))
        assert all(torch.equal(a, b) for a, b in zip(self.masks(quiet), Wanda().masks(m, self.levels()), strict=True))

    def test_many_samples_weigh_as_much_as_few(self) -> None:
        """n copies of one sample: L1 is n |g|, and the factor undoes it; so does L2's with sqrt(n)."""
        m, one = matrix(), torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))
        for criterion in (Gblm(), GblmL2()):
            scores = [criterion.score(replace(m, gradients=gradients_of(one.repeat(count, 1, 1)))) for count in (1, 7)]
            if isinstance(criterion, GblmL2):
                # sqrt(n) |g| sqrt(128 / n) = sqrt(128) |g|
                expected = m.W.abs() * (m.norm + 100 * 128**0.5 * one[0].abs())
            else:
                expected = m.W.abs() * (m.norm + 100 * 128 * one[0].abs())
            for score in scores:
                torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-3)


class TestGblmL2(WeightCriterionSuite):
    criterion = GblmL2
    formula = staticmethod(lambda W, norm, g: W.abs() * (norm + 100 * (128 / 5 * g.squared).sqrt()))
    by_row = True


class TestRia(WeightCriterionSuite):
    criterion = Ria
    formula = staticmethod(
        lambda W, norm, g: (W.abs() / W.abs().sum(0) + W.abs() / W.abs().sum(1, keepdim=True)) * norm.sqrt()  # noqa: ARG005
    )

    def test_shares_sum_to_one_and_scale_does_not_matter(self) -> None:
        m = matrix()
        column, row = shares(m.W)
        torch.testing.assert_close(column.sum(0), torch.ones(32))
        torch.testing.assert_close(row.sum(1), torch.ones(24))
        torch.testing.assert_close(Ria().score(m), Ria().score(replace(m, W=-3 * m.W)))


class TestRiaPermuted(WeightCriterionSuite):
    criterion = RiaPermuted
    in_groups = False

    @pytest.mark.parametrize("kept", [1, 2, 3])
    def test_keeps_more_of_the_score_than_the_given_order(self, kept: int) -> None:
        """Neighbours that are all strong, or all weak, are what a permutation is for."""
        m = matrix(48, 64, seed=2)
        m.W.mul_(torch.linspace(0.1, 3, 64))
        scores = Ria().score(m)
        (plain,), (permuted,) = (list(c.masks(m, [Sparsity.n_m(kept, 4)])) for c in (Ria(), RiaPermuted()))
        assert float((scores * permuted).sum()) > float((scores * plain).sum())
        assert bool((permuted.sum(1) == kept * 16).all())


class TestZPruner(WeightCriterionSuite):
    criterion = ZPruner

    @staticmethod
    def formula(W: Tensor, norm: Tensor, _: Any) -> Tensor:
        R, C = W / W.norm(dim=1, keepdim=True), W / W.norm(dim=0)
        s = float((W.abs() < 0.1 * W.abs().mean()).double().mean())
        a = 0.7 * (1 - 0.3 * s)
        cubes = [((Z - Z.mean()) / Z.std()).abs() ** 3 for Z in (R, C)]
        return (a * cubes[0] + (1 - a) * cubes[1]) * norm**1.5

    def test_scale_and_sign_do_not_matter(self) -> None:
        m = matrix()
        for factor in (2.5, -1.0):
            other = replace(m, W=m.W * factor)
            assert all(torch.equal(a, b) for a, b in zip(self.masks(m), self.masks(other), strict=True))


class TestZPrunerRows(TestZPruner):
    criterion = ZPrunerRows
    by_row = True


class TestSparseGpt(WeightCriterionSuite):
    criterion = SparseGpt
    exact = False

    def test_uncorrelated_inputs_of_equal_size_leave_magnitude(self) -> None:
        block = sample(32, 24, kind="white", seed=1)
        zero, hundred = torch.zeros(32).double(), torch.full((32,), 100.0).double()
        stats = replace(block.stats, mean=zero, energy=hundred, scatter=hundred.diag())
        m = Matrix("up", block.W.float(), stats)
        for level, mask in zip(self.levels(), self.masks(m), strict=True):
            (expected,) = Magnitude().masks(m, [level])
            assert torch.equal(mask, expected), level
            torch.testing.assert_close(repaired(m.W, stats, mask), m.W * mask, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("level", [Sparsity.n_m(2, 4), Sparsity(0.5)])
    @pytest.mark.parametrize("kind", ["correlated", "low_rank"])
    def test_beats_wanda_and_the_repair_beats_no_repair(self, level: Sparsity, kind: str) -> None:
        """Every mask is better with its repair; SparseGPT's is the better mask to repair, on average."""
        totals = [0.0, 0.0]
        for seed in range(6):
            m, rows = matrix(64, 64, seed=seed, kind=kind), sample(64, 64, seed=seed, kind=kind).rows
            assert m.inputs is not None
            for index, criterion in enumerate((SparseGpt(), Wanda())):
                (mask,) = criterion.masks(m, [level])
                fixed, plain = repaired(m.W, m.inputs, mask), m.W * mask
                errors = [float((rows @ (m.W - W).double().T).pow(2).sum()) for W in (fixed, plain)]
                assert errors[0] < errors[1]
                totals[index] += errors[0]
        assert totals[0] < totals[1]

    def test_its_own_sweep_leaves_what_the_repair_of_its_mask_gives(self) -> None:
        m = matrix(16, 300, seed=2)
        assert m.inputs is not None
        from selfpruner.compensation.sweep import factor

        U, dead = factor(m.inputs)
        diagonal = U.diagonal()
        W, mask, errors = sweep(m.W, U, dead, lambda a, b, w: keep_n((w / diagonal[a:b]).pow(2), 2, 4), every=4)
        (again,) = self.masks(m, [Sparsity.n_m(2, 4)])
        assert torch.equal(mask, again)
        torch.testing.assert_close(repaired(m.W, m.inputs, again), W, rtol=1e-3, atol=1e-3)
        H = m.inputs.gram + 0.01 * m.inputs.gram.diagonal().mean() * torch.eye(300, dtype=torch.float64)
        D = m.W.double() - W.double()
        assert float(errors.sum()) == pytest.approx(float(((D @ H) * D).sum()), rel=1e-3), "the squared errors add up"

    def test_a_dead_input_loses_its_weights(self) -> None:
        block = sample(32, 24)
        block.X[..., 9] = 0
        m = Matrix("up", block.W.float(), statistics_of(block.X))
        assert m.inputs is not None
        (mask,) = self.masks(m, [Sparsity(0.5)])
        assert not repaired(m.W, m.inputs, mask)[:, 9].any()


class TestEggs(WeightCriterionSuite):
    criterion = Eggs

    @pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8), (3, 4)])
    def test_every_input_keeps_its_connections(self, kept: int, group: int) -> None:
        scores = Ria().score(matrix(26, 32, seed=7))
        before = torch.inf
        for diagonals in range(kept + 1):
            mask = expander_mask(scores, kept, group, diagonals)
            assert bool((mask.view(26, -1, group).sum(-1) == kept).all())
            tiles = mask[: 26 // group * group].view(-1, group, 32 // group, group)
            assert int(tiles.sum(1).min()) >= diagonals
            total = float((scores * mask).sum())
            assert total <= before + 1e-6, "what is forced cannot keep more"
            before = total
        assert torch.equal(expander_mask(scores, kept, group, 0), keep_n(scores, kept, group))
        assert bool((expander_mask(scores, kept, group, kept)[:group, :group].sum(0) == kept).all()), "doubly regular"

    def test_the_diagonals_are_the_strongest(self) -> None:
        scores = torch.full((4, 4), 0.1)
        scores[[0, 1, 2, 3], [2, 3, 0, 1]] = 0.5  # the diagonal that is two further on
        scores[:, 0] += 0.45
        mask = expander_mask(scores, 1, 4, 1)
        assert mask.nonzero().tolist() == [[0, 2], [1, 3], [2, 0], [3, 1]]

    def test_more_diagonals_than_weights_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="B must be"):
            expander_mask(torch.rand(8, 8), 2, 4, 3)


def test_every_criterion_for_weights_has_its_suite() -> None:
    wanted = {cls for cls in criteria.CRITERIA.values() if {"n_m", "unstructured"} & set(cls.patterns)}
    assert {suite.criterion for suite in suites_of(WeightCriterionSuite)} == wanted


@pytest.mark.parametrize(("kept", "group"), [(5, 4), (-1, 4), (1, 0)])
def test_no_such_n_m(kept: int, group: int) -> None:
    with pytest.raises(ConfigError, match="no N:M pattern"):
        Sparsity.n_m(kept, group)
