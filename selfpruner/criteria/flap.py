"""FLAP's metrics: how much a unit's input varies, and how much its columns amplify that (criteria.md 4.7)."""

from typing import ClassVar

from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.criteria.base import Heads, Need, ScoreUnits, UnitBlock


class Flap(ScoreUnits):
    """WIFV: S_j = var(X_j) * ||W_:,j||_2^2. For attention the metric is squared first, then averaged over the head's columns.

    FLAP standardises per layer before it compares layers; inside one block that changes no order, and comparing layers is
    the search's business here.
    """

    name: ClassVar[str] = "flap"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "An et al. 2023, arXiv 2312.11983, WIFV"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations"})

    def score_columns(self, block: UnitBlock) -> Tensor:
        return block.stats.variance.to(block.W) * block.W.pow(2).sum(0)

    def score_heads(self, columns: Tensor, heads: Heads) -> Tensor:
        return columns.pow(2).view(heads.kv_groups, heads.heads_per_group, heads.head_dim).mean(-1)


class FlapNorm(Flap):
    """WIFN: S_j = mean_i |W_ij| * ||X_j||_2 / sqrt(sequences), reduced over heads as FLAP does."""

    name: ClassVar[str] = "flap_wifn"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "An et al. 2023, arXiv 2312.11983, WIFN"

    def score_columns(self, block: UnitBlock) -> Tensor:
        return block.W.abs().mean(0) * block.stats.norm.to(block.W)


class FlapVariance(Flap):
    """IFV: S_j = var(X_j), whatever the weights."""

    name: ClassVar[str] = "flap_ifv"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "An et al. 2023, arXiv 2312.11983, IFV"

    def score_columns(self, block: UnitBlock) -> Tensor:
        return block.stats.variance.to(block.W)
