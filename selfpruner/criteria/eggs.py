"""EGGS-PTP: N:M pruning guided by expander graphs. Every input keeps some of its connections (criteria.md 3).

The paper's full text and code are not public. This is a reconstruction from its abstract and reviews: RIA's score, an integer B,
and a choice of diagonals that leaves every input at least B connections and every output the same number. The tile, and choosing
diagonals by their sum, are this project's reading; according to the reviews the paper's guarantee concerns degrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.criteria.base import Matrix
from selfpruner.criteria.masks import Sparsity, grouped, keep_n, masks_of
from selfpruner.criteria.ria import Ria
from selfpruner.errors import ConfigError


class Eggs(Ria):
    """In every tile of M outputs by one group of M inputs the B wrapped diagonals of largest RIA score stay, and then the best of
    each row until N are kept. A diagonal touches every row and every column once: each input keeps at least B per tile.

    Outputs left over when M does not divide their number are pruned by RIA's score alone.
    """

    name: ClassVar[str] = "eggs"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "reconstruction of EGGS-PTP, arXiv 2508.09471, on RIA's score"
    diagonals: ClassVar[int] = 1
    """B. One is the natural choice at 2:4; B = 0 is RIA, B = N a doubly regular mask."""

    def masks(self, matrix: Matrix, levels: Sequence[Sparsity]) -> Iterator[Tensor]:
        scores = self.score(matrix)
        for level in levels:
            if level.group:
                yield expander_mask(scores, level.kept, level.group, min(self.diagonals, level.kept))
            else:
                yield from masks_of(scores, [level], by_row=False)


def expander_mask(scores: Tensor, kept: int, group: int, diagonals: int) -> Tensor:
    """The N:M mask (out, in) of ``scores`` with ``diagonals`` (B) forced diagonals per tile. Raises ConfigError unless B <= N."""
    if not 0 <= diagonals <= kept:
        raise ConfigError(f"B must be between 0 and the {kept} weights that stay of {group}, not {diagonals}.", param="diagonals")
    whole = len(scores) // group * group
    if diagonals == 0 or whole == 0:
        return keep_n(scores, kept, group)
    tiles = grouped(scores[:whole], group).unflatten(0, (-1, group)).transpose(1, 2)  # (row tiles, groups, M rows, M columns)
    row = torch.arange(group, device=scores.device)
    column = (row[:, None] + row) % group  # [d, r]: the column that diagonal d has in row r
    totals = tiles[..., row.expand(group, group), column].sum(-1)  # (row tiles, groups, M diagonals)
    best = torch.argsort(totals, dim=-1, descending=True, stable=True)[..., :diagonals]
    owner = (row - row[:, None]) % group  # [r, c]: the diagonal of row r, column c
    forced = (owner.flatten() == best[..., None]).any(-2).unflatten(-1, (group, group))  # (row tiles, groups, M, M)
    # Forced ones first, then the best of the others; a score is never negative.
    raised = tiles + forced * (tiles.amax() + 1)
    order = torch.argsort(raised, dim=-1, descending=True, stable=True)[..., :kept]
    mask = torch.zeros(tiles.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order, True)
    mask = mask.transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.cat([mask, keep_n(scores[whole:], kept, group)])
