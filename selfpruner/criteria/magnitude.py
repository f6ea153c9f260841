"""Magnitude: small weights go (criteria.md 4.1; the structured form is that of FLAP's repository)."""

from typing import ClassVar

from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.criteria.base import Matrix, Need, ScoreUnits, ScoreWeights, UnitBlock


class Magnitude(ScoreUnits, ScoreWeights):
    """Weights: |W_ij|, one threshold per matrix. Units: S_j = ||W_:,j||_2 of the output matrix; a head's score is the sum over
    its columns."""

    name: ClassVar[str] = "magnitude"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "Han et al. 2015, arXiv 1506.02626"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def score_columns(self, block: UnitBlock) -> Tensor:
        return block.W.pow(2).sum(0).sqrt()

    def score(self, matrix: Matrix) -> Tensor:
        return matrix.W.abs()
