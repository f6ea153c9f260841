"""No compensation: the kept columns stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation.base import energy, suffix_energies


@dataclass(frozen=True, slots=True)
class Slice:
    """Keeps the first columns of W; ``left`` are its errors; ``mean`` (n,) gives a bias, if any. Kept in float32."""

    W: Tensor
    left: Tensor
    mean: Tensor | None = None

    def weights(self, k: int) -> tuple[Tensor, Tensor | None]:
        return self.W[:, :k], None if self.mean is None else self.W[:, k:] @ self.mean[k:]

    def errors(self) -> Tensor:
        return self.left


@dataclass(frozen=True, slots=True)
class SliceSubset:
    W: Tensor
    moment: Tensor
    mean: Tensor | None = None

    def weights(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        gone = complement(kept, self.W.shape[1])
        return self.W[:, kept], None if self.mean is None else self.W[:, gone] @ self.mean[gone]

    def error(self, kept: Tensor) -> float:
        gone = complement(kept, self.W.shape[1])
        return max(energy(self.W[:, gone], self.moment[gone][:, gone]), 0.0)


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
        return Slice(W.float(), suffix_energies(W, stats.gram.to(W)[order][:, order]))

    def subset(self, W: Tensor, stats: BlockStatistics) -> SliceSubset:
        return SliceSubset(W.float(), stats.gram.float())
