"""Wanda-sp: Wanda's weight-times-activation score, averaged over outputs (FLAP's structured form of Wanda, criteria.md 4.6)."""

from typing import ClassVar

from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.criteria.base import ScoreCriterion


class WandaSp(ScoreCriterion):
    """S_j = mean_i |W_ij| * ||X_j||_2 / sqrt(sequences); a head's score is the sum over its columns."""

    name: ClassVar[str] = "wanda_sp"
    source: ClassVar[str] = "Sun et al. 2023, arXiv 2306.11695; An et al. 2023, arXiv 2312.11983"

    def score_columns(self, W: Tensor, stats: BlockStatistics) -> Tensor:
        return W.abs().mean(0) * stats.norm.to(W)
