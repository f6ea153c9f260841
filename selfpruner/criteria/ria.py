"""RIA: relative importance and activations (criteria.md 4.4), and its channel permutation for N:M (4.5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.criteria.base import Matrix, Need, ScoreWeights
from selfpruner.criteria.masks import Sparsity, grouped, keep_n, masks_of

ACTIVATION_POWER = 0.5

# The assignment takes time cubic in the number of groups, so it is solved among so many at a time, as the paper's fast mode does.
BLOCKS_AT_ONCE = 128


class Ria(ScoreWeights):
    """S_ij = (|W_ij| / sum_i' |W_i'j| + |W_ij| / sum_j' |W_ij'|) * (||X_j||_2 / sqrt(sequences))^0.5, one threshold per matrix."""

    name: ClassVar[str] = "ria"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "Zhang et al. 2024, RIA (ICLR 2024)"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations"})

    def score(self, matrix: Matrix) -> Tensor:
        column, row = shares(matrix.W)
        return (column + row) * matrix.norm.pow(ACTIVATION_POWER)


class RiaPermuted(Ria):
    """RIA at N:M after its channel permutation: the inputs are dealt to the groups so that strong ones do not crowd in one.

    The mask comes back in the matrix's own order: it is N:M in the permuted order only, which a kernel for N:M needs.
    """

    name: ClassVar[str] = "ria_permuted"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns

    def masks(self, matrix: Matrix, levels: Sequence[Sparsity]) -> Iterator[Tensor]:
        scores = self.score(matrix)
        for level in levels:
            if not level.group:
                yield from masks_of(scores, [level], by_row=False)
                continue
            order = permutation(scores, level.kept, level.group)
            mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
            mask[:, order] = keep_n(scores[:, order], level.kept, level.group)
            yield mask


def shares(W: Tensor) -> tuple[Tensor, Tensor]:
    """|W| as a share of its column's and of its row's sum, each (out, in). A column or row of zeros has shares of zero."""
    size = W.abs()
    tiny = torch.finfo(W.dtype).tiny
    return size / size.sum(0, keepdim=True).clamp_min(tiny), size / size.sum(1, keepdim=True).clamp_min(tiny)


def permutation(scores: Tensor, kept: int, group: int) -> Tensor:
    """The order (in,) of the inputs that N:M is applied in.

    Columns by their total score are cut into ``group`` segments, one for each place of the groups, every second one reversed; then,
    place by place, the columns of that place are dealt anew to the groups so that the kept score is as large as it can be.
    """
    count = grouped(scores, group).shape[1]
    ranked = torch.argsort(scores.sum(0), stable=True).view(group, count)
    places = torch.stack([segment.flip(0) if index % 2 else segment for index, segment in enumerate(ranked)])
    if not 0 < kept < group or count == 1:
        return places.T.flatten()
    for index in range(group):
        for start in range(0, count, BLOCKS_AT_ONCE):
            part = places[:, start : start + BLOCKS_AT_ONCE]
            part[index] = part[index][_dealt(scores, part, index, kept)]
    return places.T.flatten()


def _dealt(scores: Tensor, places: Tensor, place: int, kept: int) -> Tensor:
    """Which column of ``places`` (group, blocks) at ``place`` each block gets, (blocks,).

    With the others of a block fixed, a newcomer adds to a row what it exceeds the row's ``kept``-th best by, if it does.
    """
    from scipy.optimize import linear_sum_assignment

    others = torch.cat([places[:place], places[place + 1 :]])  # (group - 1, blocks)
    field = scores[:, others]  # (out, group - 1, blocks)
    lowest = field.topk(kept, dim=1).values[:, -1]  # (out, blocks): the last one kept, which a better newcomer replaces
    newcomers = scores[:, places[place]]  # (out, blocks)
    gain = torch.stack([(newcomers - lowest[:, [block]]).clamp_min_(0).sum(0) for block in range(places.shape[1])])
    _, chosen = linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)
    return torch.as_tensor(chosen, device=places.device)
