"""The shape of one pruned layer. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps. No heads: the attention is gone; no channels: the FFN is gone; each with its norm."""

    kv_groups: int
    heads_per_group: int
    channels: int

    @property
    def heads(self) -> int:
        return self.kv_groups * self.heads_per_group
