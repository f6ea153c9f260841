"""Taylor: how much the loss would change, to first and second order (criteria.md 4.1 and 4.8, LLM-Pruner).

g is the gradient of the mean loss over the calibration text, F the mean over sequences of its square (a diagonal Fisher matrix).
The members of a unit are its rows of gate and up (only up where there is no gate; q for heads) and its columns of the output
matrix. A KV group also has its rows of k and v.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.criteria.base import Heads, Matrix, Need, ScoreUnits, ScoreWeights, UnitBlock

OUTPUTS = ("o", "down")


class _Taylor(ScoreUnits):
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    source: ClassVar[str] = "Ma et al. 2023, LLM-Pruner, arXiv 2305.11627"

    @abstractmethod
    def element(self, matrix: Matrix) -> Tensor:
        """(out, in): every weight's share of its member's score."""

    def member(self, matrix: Matrix, axis: int) -> Tensor:
        """The member's score of every unit's column (axis 0 is summed) or row (axis 1)."""
        return self.element(matrix).sum(axis)

    def score_columns(self, block: UnitBlock) -> Tensor:
        score = torch.zeros(block.W.shape[1], dtype=torch.float64, device=block.W.device)
        for name, matrix in block.coupled.items():
            if name in OUTPUTS:
                score += self.member(matrix, 0)
            elif name in ("gate", "up", "q"):
                score += self.member(matrix, 1)
        return score

    def score_groups(self, block: UnitBlock, heads: Heads) -> Tensor:
        scores = torch.zeros(heads.kv_groups, dtype=torch.float64, device=block.W.device)
        for name in ("k", "v"):
            scores += self.member(block.coupled[name], 1).view(heads.kv_groups, heads.head_dim).sum(1)
        return scores


class Taylor(_Taylor, ScoreWeights):
    """element^1: the sum of |w g| over the members. As a weight's own score |w g|, within the matrix."""

    name: ClassVar[str] = "taylor"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns

    def element(self, matrix: Matrix) -> Tensor:
        return (matrix.W * matrix.gradient.mean.to(matrix.W)).abs()

    def score(self, matrix: Matrix) -> Tensor:
        return self.element(matrix)


class TaylorVector(_Taylor):
    """vector: |sum of w g| over each member."""

    name: ClassVar[str] = "taylor_vector"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns

    def element(self, matrix: Matrix) -> Tensor:
        return matrix.W * matrix.gradient.mean.to(matrix.W)

    def member(self, matrix: Matrix, axis: int) -> Tensor:
        return self.element(matrix).sum(axis).abs()


class TaylorSecond(_Taylor):
    """element^2: the sum of w F w."""

    name: ClassVar[str] = "taylor_element2"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns

    def element(self, matrix: Matrix) -> Tensor:
        return matrix.W.pow(2) * matrix.gradient.fisher.to(matrix.W)


class TaylorMixed(_Taylor):
    """mixed: the sum of |w g - w F w / 2|."""

    name: ClassVar[str] = "taylor_mixed"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns

    def element(self, matrix: Matrix) -> Tensor:
        gradients = matrix.gradient
        return (matrix.W * gradients.mean.to(matrix.W) - 0.5 * matrix.W.pow(2) * gradients.fisher.to(matrix.W)).abs()
