"""What every criterion must do, for units and for single weights."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from selfpruner import criteria
from selfpruner.calibration.gradients import Gradients
from selfpruner.criteria import Criterion, Heads, Matrix, UnitCriterion, WeightCriterion
from selfpruner.criteria.masks import Sparsity, keep_n
from selfpruner.errors import CalibrationError, ConfigError, UnknownNameError
from selfpruner.testing.blocks import Sample, gradients_of, matrix, sample, statistics_of, with_gradients
from selfpruner.testing.device_suite import DeviceSuite

KINDS = ("white", "correlated", "low_rank", "offset")


def registered(criterion: type[Criterion], pattern: str) -> Criterion:
    """What its name stands for. Fails, where that is nothing, with what there is to do."""
    try:
        return criteria.create(criterion.name, pattern)
    except UnknownNameError as error:
        pytest.fail(
            f"{error} Install the package whose entry point in the group selfpruner.criteria is named {criterion.name!r}: "
            "pip install -e . in its folder.",
            pytrace=False,
        )


class CriterionSuite(DeviceSuite):
    """Subclass it with ``criterion``, and with ``formula`` where its scores follow from W and X alone."""

    criterion: ClassVar[type[UnitCriterion]]

    @staticmethod
    def formula(W: Tensor, X: Tensor) -> Tensor | None:  # noqa: ARG004
        """The columns' scores (n,) from W (d, n) and X (sequences, length, n)."""
        return None

    @staticmethod
    def head_formula(columns: Tensor) -> Tensor:
        """The heads' scores from their columns' (..., head_dim)."""
        return columns.sum(-1)

    def order(self, block: Sample) -> list[int]:
        return [int(i) for i in self.criterion().order_channels(with_gradients(block))]

    def heads(self, block: Sample, heads: Heads) -> dict[tuple[int, int], list[int]]:
        return self.criterion().choose_heads(with_gradients(block, heads), heads)

    def test_is_registered(self) -> None:
        assert isinstance(registered(self.criterion, "structured"), self.criterion)
        assert self.criterion.source

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("n", [1, 2, 7, 100])
    def test_order_is_a_permutation(self, n: int, kind: str) -> None:
        assert sorted(self.order(sample(n, kind=kind))) == list(range(n))

    def test_is_deterministic_and_changes_nothing(self) -> None:
        block = sample(40)
        before = [t.clone() for t in (block.W, block.stats.scatter, block.stats.mean, block.stats.variance)]
        assert self.order(block) == self.order(block)
        heads = Heads(2, 2, 10)
        assert self.heads(block, heads) == self.heads(block, heads)
        after = (block.W, block.stats.scatter, block.stats.mean, block.stats.variance)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    @pytest.mark.parametrize(("groups", "per_group"), [(1, 1), (1, 4), (4, 1), (3, 3), (2, 7)])
    def test_heads_for_every_option(self, groups: int, per_group: int) -> None:
        block = sample(groups * per_group * 4, seed=3)
        chosen = self.heads(block, Heads(groups, per_group, 4))
        assert set(chosen) == {(g, r) for g in range(1, groups + 1) for r in range(1, per_group + 1)}
        assert chosen[groups, per_group] == list(range(groups * per_group))
        for (g, r), heads in chosen.items():
            assert heads == sorted(set(heads))
            owners = [head // per_group for head in heads]
            assert len(set(owners)) == g
            assert all(owners.count(owner) == r for owner in set(owners))

    def test_the_formula(self) -> None:
        block = sample(24, seed=5)
        columns = self.formula(block.W, block.X.double())
        if columns is None:
            return
        assert self.order(block) == [int(i) for i in columns.argsort(descending=True)]
        scores = self.head_formula(columns.view(3, 2, 4))
        chosen = self.heads(block, Heads(3, 2, 4))
        best = [2 * group + int(scores[group].argmax()) for group in range(3)]
        assert chosen[3, 1] == best
        assert chosen[1, 1] == [max(best, key=lambda head: scores.flatten()[head])]
        sums = scores.sum(1)
        assert chosen[2, 2] == [head for head in range(6) if head // 2 != int(sums.argmin())]

    def test_a_channel_without_weight_goes_first(self) -> None:
        block = sample(16)
        block.W[:, 5] = 0
        assert self.order(block)[-1] == 5


HALVES = [Sparsity.n_m(kept, 4) for kept in (3, 2, 1)]


SHARES = [Sparsity(share) for share in (0.1, 0.5, 0.55, 0.9)]


class WeightCriterionSuite(DeviceSuite):
    """Subclass it with ``criterion``, and with ``formula`` where masks are made of scores."""

    criterion: ClassVar[type[WeightCriterion]]
    by_row: ClassVar[bool] = False  # the weights of an output compete with each other, not all of the matrix
    in_groups: ClassVar[bool] = True  # the columns of an N:M group stand side by side
    exact: ClassVar[bool] = True  # a share of the matrix is met to the weight

    @staticmethod
    def formula(W: Tensor, norm: Tensor, gradients: Gradients) -> Tensor | None:  # noqa: ARG004
        """Scores (out, in) from W, the norms ||X_j|| / sqrt(sequences) (in,) and the gradients."""
        return None

    def levels(self) -> list[Sparsity]:
        patterns = self.criterion.patterns
        return HALVES * ("n_m" in patterns) + SHARES * ("unstructured" in patterns)

    def masks(self, m: Matrix, levels: list[Sparsity] | None = None) -> list[Tensor]:
        return list(self.criterion().masks(m, self.levels() if levels is None else levels))

    def test_is_registered(self) -> None:
        for pattern in self.criterion.patterns:
            assert isinstance(registered(self.criterion, pattern), self.criterion)
        assert self.criterion.source

    @pytest.mark.parametrize("kind", ["white", "correlated", "low_rank", "offset"])
    @pytest.mark.parametrize(("out", "width"), [(24, 32), (4, 260), (1, 4), (7, 12)])
    def test_as_many_stay_as_the_level_says(self, out: int, width: int, kind: str) -> None:
        m = matrix(out, width, kind=kind)
        for level, mask in zip(self.levels(), self.masks(m), strict=True):
            assert mask.shape == m.W.shape
            assert mask.dtype == torch.bool
            if level.group:
                assert bool((mask.view(out, -1, 4).sum(-1) == level.kept).all()) or not self.in_groups
                assert bool((mask.sum(1) == level.kept * width // 4).all())
            elif self.by_row:
                assert bool(((~mask).sum(1) == int(level.share * width)).all())
            elif self.exact:
                assert int((~mask).sum()) == int(level.share * out * width + 1e-9)

    def test_is_deterministic_and_changes_nothing(self) -> None:
        m = matrix()
        assert m.inputs is not None
        before = [t.clone() for t in (m.W, m.inputs.scatter, m.inputs.mean, m.gradient.absolute)]
        assert all(torch.equal(a, b) for a, b in zip(self.masks(m), self.masks(m), strict=True))
        after = (m.W, m.inputs.scatter, m.inputs.mean, m.gradient.absolute)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_the_formula(self) -> None:
        m = matrix(seed=3)
        norm = torch.linalg.vector_norm(sample(32, 24, seed=3).X.flatten(0, 1).double(), dim=0) / 2
        scores = self.formula(m.W.double(), norm, m.gradient)
        if scores is None:
            return
        for level, mask in zip(self.levels(), self.masks(m), strict=True):
            if level.group:
                expected = keep_n(scores, level.kept, 4)
            elif self.by_row:
                count = int(level.share * 32)
                expected = scores > scores.sort(1).values[:, count - 1 : count] if count else scores > -1
            else:
                expected = scores > scores.flatten().sort().values[int(level.share * scores.numel()) - 1]
            assert torch.equal(mask, expected), level

    def test_zero_rows_and_columns_are_no_trouble(self) -> None:
        m = matrix(seed=4)
        m.W[3] = 0
        m.W[:, 5] = 0
        block = sample(32, 24, seed=4)
        block.X[..., 9] = 0
        m = replace(m, inputs=statistics_of(block.X))
        for level, mask in zip(self.levels(), self.masks(m), strict=True):
            assert 0 < int(mask.sum()) < mask.numel(), level

    def test_what_is_not_a_number_is_refused(self) -> None:
        m = matrix()
        block = sample(32, 24)
        block.X[0, 0, 7] = torch.nan
        broken = replace(m, inputs=statistics_of(block.X), gradients=gradients_of(torch.full((2, 24, 32), torch.nan)))
        if self.criterion.needs:
            with pytest.raises(CalibrationError, match="not finite"):
                self.masks(broken)
            with pytest.raises(CalibrationError, match="without"):
                self.masks(replace(m, inputs=None, gradients=None))
        else:
            m.W[0, 0] = torch.nan
            with pytest.raises(CalibrationError, match="not numbers"):
                self.masks(m)

    def test_a_group_that_does_not_divide_the_width(self) -> None:
        if "n_m" in self.criterion.patterns:
            with pytest.raises(ConfigError, match="do not divide") as caught:
                self.masks(matrix(24, 30), [Sparsity.n_m(2, 4)])
            assert caught.value.param == "group"

    def test_scaling_the_inputs_changes_no_mask(self) -> None:
        """Where the inputs are the only thing that is measured."""
        if "gradients" in self.criterion.needs:
            return
        m, block = matrix(seed=8), sample(32, 24, seed=8)
        louder = replace(m, inputs=statistics_of(block.X * 37.5))
        assert all(torch.equal(a, b) for a, b in zip(self.masks(m), self.masks(louder), strict=True))
