"""The contracts of a criterion: which units of a block stay longest, or which weights of a matrix. Higher score = keep.

A criterion names the ``patterns`` it can order (see ``catalogue.PATTERNS``) and what it ``needs`` beyond the weights.
One that orders units (``structured``) is a :class:`UnitCriterion`, one that orders single weights (``n_m``, ``unstructured``) a
:class:`WeightCriterion`; it may be both.

Notation of the formulas: W (out, in) is a matrix, row i an output, column j an input; X (tokens, in) its inputs on the calibration
text, g its gradients. Of a block, W (d, n) is the output matrix (o_proj or down_proj), whose input j is a column of unit j.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.criteria.masks import Sparsity, masks_of
from selfpruner.errors import CalibrationError

Need = Literal["activations", "gradients", "second_order"]
"""``activations``: norms, means and variances of inputs. ``gradients``: of the loss. ``second_order``: X^T X."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention units of a layer: ``kv_groups`` groups of ``heads_per_group`` query heads of ``head_dim`` columns each."""

    kv_groups: int
    heads_per_group: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear map: ``W`` (out, in) and what was measured at it; what no criterion asked for is None. ``name`` is ``q``, ``k``,
    ``v``, ``o``, ``gate``, ``up`` or ``down``."""

    name: str
    W: Tensor
    inputs: BlockStatistics | None = None
    gradients: Gradients | None = None

    @property
    def norm(self) -> Tensor:
        """sqrt(q_j) = ||X_j|| / sqrt(sequences), (in,), in W's dtype. Raises CalibrationError where it is not finite."""
        if self.inputs is None:
            raise CalibrationError(f"{self.name} was scored without statistics of its inputs.")
        norm = self.inputs.norm.to(self.W)
        if not bool(norm.isfinite().all()):
            raise CalibrationError(
                f"The inputs of {self.name} are not finite on the calibration text. Load the model in float32 or bfloat16, or use "
                "another text."
            )
        return norm

    @property
    def gradient(self) -> Gradients:
        """Raises CalibrationError where there are none, or where they are not finite."""
        if self.gradients is None:
            raise CalibrationError(f"{self.name} was scored without gradients.")
        if not bool(self.gradients.finite):
            raise CalibrationError(
                f"The gradients of {self.name} are not finite on the calibration text. Load the model in float32 or bfloat16, or "
                "use another text."
            )
        return self.gradients


class UnitBlock(Protocol):
    """What a unit criterion sees of a block. ``W`` (d, n), float64, is its output matrix and ``stats`` are those of its inputs;
    ``coupled`` are all its matrices with gradients, by name, for criteria that need them, else empty."""

    @property
    def W(self) -> Tensor: ...  # noqa: N802
    @property
    def stats(self) -> BlockStatistics: ...
    @property
    def coupled(self) -> dict[str, Matrix]: ...


@dataclass(frozen=True, slots=True)
class Evidence:
    """A :class:`UnitBlock`."""

    W: Tensor
    stats: BlockStatistics
    coupled: dict[str, Matrix]


@runtime_checkable
class Criterion(Protocol):
    name: ClassVar[str]
    source: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]
    needs: ClassVar[frozenset[Need]]


@runtime_checkable
class UnitCriterion(Criterion, Protocol):
    def order_channels(self, block: UnitBlock) -> Tensor:
        """Channel indices (n,), the ones to keep longest first."""
        ...

    def choose_heads(self, block: UnitBlock, heads: Heads) -> dict[tuple[int, int], list[int]]:
        """For every (KV groups, heads per group): which query heads stay, ascending."""
        ...


@runtime_checkable
class WeightCriterion(Criterion, Protocol):
    def masks(self, matrix: Matrix, levels: Sequence[Sparsity]) -> Iterator[Tensor]:
        """For each of ``levels`` the weights that stay, bool (out, in)."""
        ...


class ScoreUnits:
    """A unit criterion that gives every column of the output matrix a score of its own; units are ranked by their columns'."""

    @abstractmethod
    def score_columns(self, block: UnitBlock) -> Tensor:
        """(n,) column scores, higher = keep."""

    def score_heads(self, columns: Tensor, heads: Heads) -> Tensor:
        """(K, r) head scores from column scores: their sum, unless the criterion says otherwise."""
        return columns.view(heads.kv_groups, heads.heads_per_group, heads.head_dim).sum(-1)

    def score_groups(self, block: UnitBlock, heads: Heads) -> Tensor:
        """(K,): what a KV group is worth beyond its heads."""
        return block.W.new_zeros(heads.kv_groups)

    def order_channels(self, block: UnitBlock) -> Tensor:
        return torch.argsort(_ranked(self.score_columns(block)), descending=True, stable=True)

    def choose_heads(self, block: UnitBlock, heads: Heads) -> dict[tuple[int, int], list[int]]:
        scores = _ranked(self.score_heads(self.score_columns(block), heads))
        own = self.score_groups(block, heads).to(scores)
        in_group = torch.argsort(scores, dim=1, descending=True, stable=True)
        chosen = {}
        for per_group in range(heads.heads_per_group, 0, -1):
            kept = in_group[:, :per_group]
            group_scores = scores.gather(1, kept).sum(1) + own
            group_order = torch.argsort(group_scores, descending=True, stable=True)
            for groups in range(heads.kv_groups, 0, -1):
                chosen[groups, per_group] = sorted(
                    int(group) * heads.heads_per_group + int(head) for group in group_order[:groups] for head in kept[group]
                )
        return chosen


class ScoreWeights:
    """A weight criterion that gives every weight one score. Levels nest: what one removes, all further ones remove.

    Without a pattern of their own, weights compete within their whole matrix; with ``by_row`` within their output's row.
    """

    by_row: ClassVar[bool] = False

    @abstractmethod
    def score(self, matrix: Matrix) -> Tensor:
        """(out, in) scores, higher = keep."""

    def masks(self, matrix: Matrix, levels: Sequence[Sparsity]) -> Iterator[Tensor]:
        return masks_of(_ranked(self.score(matrix)), levels, by_row=self.by_row)


def _ranked(scores: Tensor) -> Tensor:
    """Scores that can be ranked. Raises CalibrationError for NaN, which has no place in an order."""
    if bool(scores.isnan().any()):
        raise CalibrationError("A criterion's scores are not numbers; the weights or the statistics hold NaN or infinity.")
    return scores
