"""FLAP's bias: the average contribution of the removed inputs becomes a bias of the output matrix."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation.base import suffix_energies
from selfpruner.compensation.none import Slice, SliceSubset
from selfpruner.files.tensors import HeldParts, Parts


class Bias:
    """b = W_removed mean(X_removed); the error left is that of the removed inputs' fluctuation."""

    name: ClassVar[str] = "bias"
    source: ClassVar[str] = "An et al. 2023, arXiv 2312.11983"
    adds_bias: ClassVar[bool] = True
    refits: ClassVar[bool] = False

    def nested(self, W: Tensor, stats: BlockStatistics, order: Tensor) -> Slice:
        left = suffix_energies(W, stats.scatter, order)
        return Slice(HeldParts(left=left, mean=stats.mean[order].float()), biased=True)

    def subset(self, W: Tensor, stats: BlockStatistics, kept: Tensor) -> SliceSubset:  # noqa: ARG002
        return SliceSubset(HeldParts(moment=stats.scatter.float(), mean=stats.mean.float()), biased=True)

    def nested_of(self, parts: Parts) -> Slice:
        return Slice(parts, biased=True)

    def subset_of(self, parts: Parts) -> SliceSubset:
        return SliceSubset(parts, biased=True)
