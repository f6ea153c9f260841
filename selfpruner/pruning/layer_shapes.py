"""The shape of a pruned layer, and which units it kept. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps. No heads: the attention is gone; no channels: the FFN is gone; each with its norm."""

    kv_groups: int
    heads_per_group: int
    channels: int

    @property
    def heads(self) -> int:
        return self.kv_groups * self.heads_per_group


class UnitsOfLayer(TypedDict):
    query_heads: Sequence[int] | None
    ffn_channels: Sequence[int] | None


class UnitsFile(TypedDict):
    """The content of units.json: how many units a layer of the base model has, and which of them each layer kept."""

    query_heads: int
    kv_groups: int
    ffn_channels: int
    layers: list[UnitsOfLayer]


@dataclass(frozen=True, slots=True)
class KeptUnits:
    """The base model's shape of a layer, and per layer which of its query heads and FFN channels were kept, numbered from 0 in the
    base model's order and listed in the checkpoint's. None: all of them, in their order; empty: the block is gone. Kept heads come
    by KV group, equally many of each, so they say which groups were kept."""

    base: LayerShape
    layers: Sequence[tuple[Sequence[int] | None, Sequence[int] | None]]

    def to_dict(self) -> UnitsFile:
        """The content of units.json."""
        return {
            "query_heads": self.base.heads,
            "kv_groups": self.base.kv_groups,
            "ffn_channels": self.base.channels,
            "layers": [{"query_heads": heads, "ffn_channels": channels} for heads, channels in self.layers],
        }

    @classmethod
    def from_dict(cls, body: UnitsFile) -> KeptUnits:
        base = LayerShape(body["kv_groups"], body["query_heads"] // body["kv_groups"], body["ffn_channels"])
        return cls(base, [(layer["query_heads"], layer["ffn_channels"]) for layer in body["layers"]])

    def heads(self, layer: int) -> list[int]:
        kept = self.layers[layer][0]
        return list(range(self.base.heads) if kept is None else kept)

    def groups(self, layer: int) -> list[int]:
        """The KV groups of the kept heads, each once, in their order."""
        return list(dict.fromkeys(head // self.base.heads_per_group for head in self.heads(layer)))

    def channels(self, layer: int) -> list[int]:
        kept = self.layers[layer][1]
        return list(range(self.base.channels) if kept is None else kept)
