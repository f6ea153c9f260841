"""Magnitude: the L2 norm of the unit's output columns (criteria.md 4.1; structured form of FLAP's repository)."""

from typing import ClassVar

from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.criteria.base import ScoreCriterion


class Magnitude(ScoreCriterion):
    """S_j = ||W_:,j||_2; a head's score is the sum over its columns."""

    name: ClassVar[str] = "magnitude"
    source: ClassVar[str] = "Han et al. 2015, arXiv 1506.02626"

    def score_columns(self, W: Tensor, stats: BlockStatistics) -> Tensor:  # noqa: ARG002
        return W.pow(2).sum(0).sqrt()
