"""Z-Pruner: cubed z-scores of row- and column-normalised weights, times the activation (criteria.md 1)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.criteria.base import Matrix, Need, ScoreWeights

ROW_SHARE, SPARSE_SHARE, SPARSE_BELOW = 0.7, 0.3, 0.1
ACTIVATION_POWER = 1.5


class ZPruner(ScoreWeights):
    """With R = W over its rows' norms, C = W over its columns', z the standard score over all elements (unbiased), and s the share
    of weights below a tenth of the mean |W|:

        a = 0.7 (1 - 0.3 s)        S = (a |z_R|^3 + (1 - a) |z_C|^3) * (||X_j||_2 / sqrt(sequences))^1.5

    One threshold per matrix. N:M by the same score is this project's extension; the paper has none.
    """

    name: ClassVar[str] = "zpruner"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "Bhuiyan et al. 2025, arXiv 2508.15828"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations"})

    def score(self, matrix: Matrix) -> Tensor:
        W = matrix.W.float()  # cubes of z-scores overflow 16 bits
        sparse = (W.abs() < SPARSE_BELOW * W.abs().mean()).float().mean()
        share = ROW_SHARE * (1 - SPARSE_SHARE * sparse)
        return (share * _cubed(W, 1) + (1 - share) * _cubed(W, 0)) * matrix.norm.float().pow(ACTIVATION_POWER)


class ZPrunerRows(ZPruner):
    """Z-Pruner whose weights compete within their output's row."""

    name: ClassVar[str] = "zpruner_row"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    by_row: ClassVar[bool] = True


def _cubed(W: Tensor, axis: int) -> Tensor:
    """|z|^3 of W over its norms along ``axis``; a row or column of zeros stays zero before it is standardised."""
    scaled = W / W.norm(dim=axis, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    deviation = scaled.std().clamp_min(torch.finfo(W.dtype).tiny)
    z: Tensor = scaled.sub_(scaled.mean()).div_(deviation)
    return z.abs_().pow_(3)
