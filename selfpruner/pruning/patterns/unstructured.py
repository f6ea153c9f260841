"""Unstructured pruning: single weights become zero."""

from __future__ import annotations

from typing import ClassVar

from selfpruner.criteria.masks import Sparsity
from selfpruner.pruning.patterns.zeros import ZeroingPattern


class Unstructured(ZeroingPattern):
    """Shares of zeros a ``sparsity_step`` apart."""

    name: ClassVar[str] = "unstructured"

    def levels(self) -> list[Sparsity]:
        step = self.config.sparsity_step
        shares = [round(count * step, 6) for count in range(int(1 / step) + 1)]
        return [Sparsity(share) for share in shares if share < 1] + ([Sparsity(1.0)] if self.config.drop_blocks else [])
