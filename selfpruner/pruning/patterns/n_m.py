"""N:M pruning: of every M consecutive inputs of an output N stay."""

from __future__ import annotations

from typing import ClassVar

from selfpruner.criteria.masks import Sparsity
from selfpruner.pruning.patterns.zeros import ZeroingPattern


class NM(ZeroingPattern):
    """N = M, M - 1, ... of every ``group`` M."""

    name: ClassVar[str] = "n_m"

    def levels(self) -> list[Sparsity]:
        group = self.config.group
        return [Sparsity.n_m(kept, group) for kept in range(group, -1 if self.config.drop_blocks else 0, -1)]
