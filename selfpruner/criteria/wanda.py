"""Wanda: weight times input norm (criteria.md 4.2), and Wanda-sp, its structured form (4.6)."""

from typing import ClassVar

from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.criteria.base import Matrix, Need, ScoreUnits, ScoreWeights, UnitBlock


class Wanda(ScoreWeights):
    """S_ij = |W_ij| * ||X_j||_2 / sqrt(sequences); the weights of an output compete with each other."""

    name: ClassVar[str] = "wanda"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "Sun et al. 2023, arXiv 2306.11695, eq. 1"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations"})
    by_row: ClassVar[bool] = True

    def score(self, matrix: Matrix) -> Tensor:
        return matrix.W.abs() * matrix.norm


class WandaSp(ScoreUnits):
    """S_j = mean_i |W_ij| * ||X_j||_2 / sqrt(sequences); a head's score is the sum over its columns."""

    name: ClassVar[str] = "wanda_sp"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "Sun et al. 2023, arXiv 2306.11695; An et al. 2023, arXiv 2312.11983"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations"})

    def score_columns(self, block: UnitBlock) -> Tensor:
        return block.W.abs().mean(0) * block.stats.norm.to(block.W)
