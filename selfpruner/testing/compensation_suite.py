"""What every compensation must do; the errors it reports are those measured on the inputs themselves."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from selfpruner import compensation
from selfpruner.compensation import Compensation
from selfpruner.compensation.base import energy
from selfpruner.testing.blocks import Sample, output_error, sample
from selfpruner.testing.device_suite import DeviceSuite

KINDS = ("white", "correlated", "low_rank", "offset")


def order_of(n: int, seed: int = 9) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class CompensationSuite(DeviceSuite):
    """Subclass it with ``compensation``, and with ``ridge`` where it damps."""

    compensation: ClassVar[type[Compensation]]

    def ridge(self, block: Sample) -> Tensor:
        """What the compensation adds to the diagonal of its moments, (n,)."""
        return torch.zeros(block.stats.scatter.shape[0])

    def test_is_registered(self) -> None:
        assert isinstance(compensation.create(self.compensation.name), self.compensation)
        assert self.compensation.source

    @pytest.mark.parametrize("kind", KINDS)
    def test_reported_errors_are_the_measured_ones(self, kind: str) -> None:
        block = sample(20, kind=kind)
        order = order_of(20)
        repair = self.compensation().nested(block.W, block.stats, order)
        errors, ridge = repair.errors(), self.ridge(block)
        assert errors.shape == (21,)
        assert float(errors[20]) == 0
        scale = energy(block.W, block.stats.gram)
        for k in range(1, 21):
            W, bias = repair.weights(k, block.W[:, order])
            assert W.shape == (12, k)
            assert (bias is not None) == self.compensation.adds_bias
            measured = output_error(block, W, order[:k], bias)
            # The damped fit pays for what it changes in the weights that stay.
            paid = float((ridge[order[:k]] * (block.W[:, order[:k]] - W.double()).pow(2)).sum())
            assert float(errors[k]) == pytest.approx(measured + paid, rel=1e-3, abs=1e-5 * scale)

    def test_dense_weights_come_back_whole(self) -> None:
        block = sample(20)
        order = order_of(20)
        W, bias = self.compensation().nested(block.W, block.stats, order).weights(20, block.W[:, order])
        torch.testing.assert_close(W.double(), block.W[:, order], rtol=0, atol=2e-4)
        if bias is not None:
            assert float(bias.abs().max()) <= 2e-3
        W, bias = self.compensation().subset(block.W, block.stats, torch.arange(14)).weights(torch.arange(20), block.W)
        torch.testing.assert_close(W.double(), block.W, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_subsets_and_prefixes_agree(self, kind: str) -> None:
        block = sample(20, kind=kind)
        order = order_of(20)
        nested = self.compensation().nested(block.W, block.stats, order)
        subset = self.compensation().subset(block.W, block.stats, torch.arange(14))
        for k in (1, 7, 19):
            kept, places = order[:k].sort()
            assert subset.error(kept, block.W) == pytest.approx(float(nested.errors()[k]), rel=1e-4)
            (A, a), (B, b) = nested.weights(k, block.W[:, order]), subset.weights(kept, block.W)
            torch.testing.assert_close(A[:, places].double(), B.double(), rtol=1e-3, atol=1e-3)
            if a is not None and b is not None:
                torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-2)

    def test_statistics_stay_as_they_are(self) -> None:
        block = sample(12)
        before = [t.clone() for t in (block.W, block.stats.scatter, block.stats.mean)]
        self.compensation().nested(block.W, block.stats, order_of(12)).weights(5, block.W[:, order_of(12)])
        self.compensation().subset(block.W, block.stats, torch.arange(8)).weights(torch.tensor([1, 4]), block.W)
        assert all(torch.equal(a, b) for a, b in zip(before, (block.W, block.stats.scatter, block.stats.mean), strict=True))

    def test_what_is_given_stays_when_the_dense_weights_move(self) -> None:
        """Levels are kept, while a streamed model's buffers, and a model's channels in another order, are written over."""
        block = sample(12)
        W = block.W.float()
        kept, order = torch.tensor([1, 4]), order_of(12)
        nested, subset = (
            self.compensation().nested(block.W, block.stats, order),
            self.compensation().subset(block.W, block.stats, kept),
        )
        given = [nested.weights(5, W)[0], nested.weights(12, W)[0], subset.weights(kept, W)[0]]
        before = [tensor.clone() for tensor in given]
        W.zero_()
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
