"""No compensation: the kept columns stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation.base import energy, suffix_energies
from selfpruner.tensor_files import HeldParts, Parts


@dataclass(frozen=True, slots=True)
class Slice:
    """Keeps the first columns. Parts: ``Wt`` (n, d) float32, W transposed; ``left`` (n + 1,), its errors; with ``biased``
    ``mean`` (n,), which gives a bias."""

    parts: Parts
    biased: bool = False

    def weights(self, k: int) -> tuple[Tensor, Tensor | None]:
        if not self.biased:
            return self.parts.first("Wt", k).T.contiguous(), None
        Wt = self.parts["Wt"]
        return Wt[:k].T.contiguous(), self.parts["mean"][k:] @ Wt[k:]

    def errors(self) -> Tensor:
        return self.parts["left"]


@dataclass(frozen=True, slots=True)
class SliceSubset:
    """Parts: ``W`` (d, n) and ``moment`` (n, n) float32; with ``biased`` ``mean`` (n,)."""

    parts: Parts
    biased: bool = False

    def weights(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        W = self.parts["W"]
        gone = complement(kept, W.shape[1])
        return W[:, kept], W[:, gone] @ self.parts["mean"][gone] if self.biased else None

    def error(self, kept: Tensor) -> float:
        W = self.parts["W"]
        gone = complement(kept, W.shape[1])
        return max(energy(W[:, gone], self.parts["moment"][gone][:, gone]), 0.0)


def complement(kept: Tensor, n: int) -> Tensor:
    """The indices of 0..n-1 that are not in ``kept``, ascending."""
    mask = torch.ones(n, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero().flatten()


class Nothing:
    """W' = W_kept."""

    name: ClassVar[str] = "none"
    source: ClassVar[str] = "-"
    adds_bias: ClassVar[bool] = False

    def nested(self, W: Tensor, stats: BlockStatistics, order: Tensor) -> Slice:
        W = W[:, order]
        left = suffix_energies(W, stats.gram.to(W)[order][:, order])
        return Slice(HeldParts(Wt=W.T.float().contiguous(), left=left))

    def subset(self, W: Tensor, stats: BlockStatistics) -> SliceSubset:
        return SliceSubset(HeldParts(W=W.float(), moment=stats.gram.float()))

    def nested_of(self, parts: Parts) -> Slice:
        return Slice(parts)

    def subset_of(self, parts: Parts) -> SliceSubset:
        return SliceSubset(parts)
