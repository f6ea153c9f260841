"""GBLM-Pruner: Wanda's score plus the weight times the size of its gradients over the samples (criteria.md 2)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.criteria.base import Heads, Matrix, Need, ScoreUnits, ScoreWeights, UnitBlock

# The paper's code multiplies gradients by 100 and takes 128 samples; the sum over samples grows with their number and the
# activation term does not, so the factor is that for as many samples as there are.
SCALE, SAMPLES = 100.0, 128


class Gblm(ScoreUnits, ScoreWeights):
    """S_ij = |W_ij| * (||X_j||_2 / sqrt(n) + alpha * sum_k |g_ij^(k)|), alpha = 100 * 128 / n for n samples.

    The weights of an output compete with each other. Units: the mean over the output matrix's column, this project's
    aggregation, since the paper has no structured form.
    """

    name: ClassVar[str] = "gblm"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "Das et al. 2023, arXiv 2311.04902, L1 gradients"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations", "gradients"})
    by_row: ClassVar[bool] = True

    def gradient_term(self, matrix: Matrix) -> Tensor:
        """alpha * ||g_ij||_1 over the samples, (out, in)."""
        gradients = matrix.gradient
        return gradients.absolute.to(matrix.W) * (SCALE * SAMPLES / gradients.sequences)

    def score(self, matrix: Matrix) -> Tensor:
        return matrix.W.abs() * (matrix.norm + self.gradient_term(matrix))

    def score_columns(self, block: UnitBlock) -> Tensor:
        output = block.coupled["down"] if "down" in block.coupled else block.coupled["o"]
        return self.score(output).mean(0)

    def score_heads(self, columns: Tensor, heads: Heads) -> Tensor:
        return columns.view(heads.kv_groups, heads.heads_per_group, heads.head_dim).sum(-1)


class GblmL2(Gblm):
    """The same with the gradients' L2 norm over the samples, sqrt(sum_k (g_ij^(k))^2), and alpha = 100 * sqrt(128 / n)."""

    name: ClassVar[str] = "gblm_l2"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "Das et al. 2023, arXiv 2311.04902, L2 gradients"

    def gradient_term(self, matrix: Matrix) -> Tensor:
        gradients = matrix.gradient
        return gradients.squared.to(matrix.W).sqrt() * (SCALE * math.sqrt(SAMPLES / gradients.sequences))
