"""The contract of a criterion: the order in which a block's units should be kept. Higher score = keep.

Notation of the formulas: W (d, n) is the block's output matrix (o_proj or down_proj) in float64, column j belongs to input j;
statistics describe the n inputs. A unit's score is made from the scores of its columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention units of a layer: ``kv_groups`` groups of ``heads_per_group`` query heads of ``head_dim`` columns each."""

    kv_groups: int
    heads_per_group: int
    head_dim: int


class Criterion(Protocol):
    name: ClassVar[str]
    source: ClassVar[str]

    def order_channels(self, W: Tensor, stats: BlockStatistics) -> Tensor:
        """Channel indices (n,), the ones to keep longest first."""
        ...

    def choose_heads(self, W: Tensor, stats: BlockStatistics, heads: Heads) -> dict[tuple[int, int], list[int]]:
        """For every (KV groups, heads per group): which query heads stay, ascending."""
        ...


class ScoreCriterion(ABC):
    """A criterion that gives every column a score of its own; units are ranked by the scores of their columns."""

    name: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def score_columns(self, W: Tensor, stats: BlockStatistics) -> Tensor:
        """(n,) column scores, higher = keep."""

    def score_heads(self, columns: Tensor, heads: Heads) -> Tensor:
        """(K, r) head scores from column scores: their sum, unless the criterion says otherwise."""
        return columns.view(heads.kv_groups, heads.heads_per_group, heads.head_dim).sum(-1)

    def order_channels(self, W: Tensor, stats: BlockStatistics) -> Tensor:
        return torch.argsort(self.score_columns(W, stats), descending=True, stable=True)

    def choose_heads(self, W: Tensor, stats: BlockStatistics, heads: Heads) -> dict[tuple[int, int], list[int]]:
        scores = self.score_heads(self.score_columns(W, stats), heads)
        in_group = torch.argsort(scores, dim=1, descending=True, stable=True)
        chosen = {}
        for per_group in range(heads.heads_per_group, 0, -1):
            kept = in_group[:, :per_group]
            group_scores = scores.gather(1, kept).sum(1)
            group_order = torch.argsort(group_scores, descending=True, stable=True)
            for groups in range(heads.kv_groups, 0, -1):
                chosen[groups, per_group] = sorted(
                    int(group) * heads.heads_per_group + int(head) for group in group_order[:groups] for head in kept[group]
                )
        return chosen
