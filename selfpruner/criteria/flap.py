"""FLAP's WIFV: weighted input feature variance (criteria.md 4.7)."""

from typing import ClassVar

from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.criteria.base import Heads, ScoreCriterion


class Flap(ScoreCriterion):
    """S_j = var(X_j) * ||W_:,j||_2^2. For attention the metric is squared first, then averaged over the head's columns.

    FLAP standardises per layer before it compares layers; inside one block that changes no order, and comparing layers is
    the search's business here.
    """

    name: ClassVar[str] = "flap"
    source: ClassVar[str] = "An et al. 2023, arXiv 2312.11983"

    def score_columns(self, W: Tensor, stats: BlockStatistics) -> Tensor:
        return stats.variance.to(W) * W.pow(2).sum(0)

    def score_heads(self, columns: Tensor, heads: Heads) -> Tensor:
        return columns.pow(2).view(heads.kv_groups, heads.heads_per_group, heads.head_dim).mean(-1)
