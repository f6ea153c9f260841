"""SparseGPT's choice of weights: those that cost little while the weights before them are being repaired (criteria.md 4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.compensation.sweep import COLUMNS, factor, sweep
from selfpruner.criteria.base import Matrix, Need
from selfpruner.criteria.masks import Sparsity, grouped, keep_n, masks_of
from selfpruner.errors import CalibrationError


class SparseGpt:
    """e_ij = (W_ij / U_jj)^2 with the weights as the sweep left them. In every 128 columns the lowest go, or in every group of M.

    This is the mask; the weights that the sweep leaves are those that the compensation ``least_squares`` gives for this mask, as
    both take the same steps in the same order. With another compensation the mask is used alone.
    """

    name: ClassVar[str] = "sparsegpt"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "Frantar & Alistarh 2023, arXiv 2301.00774"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations", "second_order"})

    def masks(self, matrix: Matrix, levels: Sequence[Sparsity]) -> Iterator[Tensor]:
        if matrix.inputs is None or not bool(matrix.norm.isfinite().all()):
            raise CalibrationError(f"{matrix.name} was scored without statistics of its inputs.")
        U, dead = factor(matrix.inputs)
        diagonal = U.diagonal()
        for level in levels:
            if level.group:
                grouped(matrix.W, level.group)  # an unfit group is refused before any work

            def choose(start: int, stop: int, W: Tensor, level: Sparsity = level) -> Tensor:
                scores = (W / diagonal[start:stop]).pow(2)
                if level.group:
                    return keep_n(scores, level.kept, level.group)
                return next(masks_of(scores, [level], by_row=False))

            # Groups are chosen when their turn comes, with all columns before them repaired.
            yield sweep(matrix.W, U, dead, choose, every=level.group or COLUMNS)[1]
