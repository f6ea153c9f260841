"""No compensation: the kept columns stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation.base import energy, suffix_energies
from selfpruner.files.tensors import HeldParts, Parts


@dataclass(frozen=True, slots=True)
class Slice:
    """Keeps the first columns. Parts: ``left`` (n + 1,), its errors; with ``biased`` ``mean`` (n,), which gives a bias."""

    parts: Parts
    biased: bool = False

    def weights(self, k: int, W: Tensor) -> tuple[Tensor, Tensor | None]:
        # A copy, because levels are kept, and a streamed model's W is a buffer that other layers will be read into.
        kept = W[:, :k].to(torch.float32, copy=True)
        return kept, W[:, k:].float() @ self.parts["mean"][k:] if self.biased else None

    def errors(self) -> Tensor:
        return self.parts["left"]


@dataclass(frozen=True, slots=True)
class SliceSubset:
    """Parts: ``moment`` (n, n) float32; with ``biased`` ``mean`` (n,)."""

    parts: Parts
    biased: bool = False

    def weights(self, kept: Tensor, W: Tensor) -> tuple[Tensor, Tensor | None]:
        gone = complement(kept, W.shape[1])
        return W[:, kept].float(), W[:, gone].float() @ self.parts["mean"][gone] if self.biased else None

    def error(self, kept: Tensor, W: Tensor) -> float:
        gone = complement(kept, W.shape[1])
        return max(energy(W[:, gone].float(), self.parts["moment"][gone][:, gone]), 0.0)


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
    refits: ClassVar[bool] = False

    def nested(self, W: Tensor, stats: BlockStatistics, order: Tensor) -> Slice:
        return Slice(HeldParts(left=suffix_energies(W, stats.scatter, order, stats.mean.to(W), stats.tokens)))

    def subset(self, W: Tensor, stats: BlockStatistics, kept: Tensor) -> SliceSubset:  # noqa: ARG002
        return SliceSubset(HeldParts(moment=stats.gram.float()))

    def nested_of(self, parts: Parts) -> Slice:
        return Slice(parts)

    def subset_of(self, parts: Parts) -> SliceSubset:
        return SliceSubset(parts)
