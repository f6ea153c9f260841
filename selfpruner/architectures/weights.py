"""The weights of one block as plain tensors, and the same block with fewer units.

Shapes: d = hidden size, h = head_dim, K = KV groups, r = query heads per group, F = FFN channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One attention block. q (K*r*h, d), k and v (K*h, d), o (d, K*r*h); heads of a group are adjacent, as in the checkpoint.

    ``q_norm`` and ``k_norm`` (h,) scale RMS norms over a head, shared by all heads (Qwen3, Gemma 3).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    kv_groups: int
    heads_per_group: int
    head_dim: int
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    matrices: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")

    def keep_heads(self, heads: list[int], kv_groups: int, heads_per_group: int) -> AttentionWeights:
        """The block with only ``heads`` (ascending, ``heads_per_group`` in each kept group); ``o`` is sliced, not repaired."""
        h = self.head_dim
        groups = sorted({head // self.heads_per_group for head in heads})
        rows = _spread(heads, h, self.q.device)
        kv_rows = _spread(groups, h, self.k.device)
        return replace(
            self,
            q=self.q[rows],
            k=self.k[kv_rows],
            v=self.v[kv_rows],
            o=self.o[:, rows],
            q_bias=None if self.q_bias is None else self.q_bias[rows],
            k_bias=None if self.k_bias is None else self.k_bias[kv_rows],
            v_bias=None if self.v_bias is None else self.v_bias[kv_rows],
            kv_groups=kv_groups,
            heads_per_group=heads_per_group,
        )


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """One FFN. gate and up (F, d), down (d, F). Without a gate (None) it is down(activation(up(x)))."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def matrices(self) -> tuple[str, ...]:
        return ("up", "down") if self.gate is None else ("gate", "up", "down")

    def first_channels(self, count: int) -> FfnWeights:
        """The first ``count`` channels, as views."""
        return self._select(slice(count))

    def in_order(self, order: Tensor) -> FfnWeights:
        """The channels in the order of the index tensor ``order`` (F,)."""
        return self._select(order)

    def _select(self, channels: slice | Tensor) -> FfnWeights:
        return replace(
            self,
            gate=None if self.gate is None else self.gate[channels],
            up=self.up[channels],
            down=self.down[:, channels],
            gate_bias=None if self.gate_bias is None else self.gate_bias[channels],
            up_bias=None if self.up_bias is None else self.up_bias[channels],
        )


W = TypeVar("W", bound=AttentionWeights | FfnWeights)


def with_tensors(weights: W, tensors: Mapping[str, Tensor]) -> W:
    """The same block with some tensors, by their names, in place of its own."""
    changed: dict[str, Any] = dict(tensors)  # every name is a field for a tensor
    return replace(weights, **changed)


def in_float32(weights: W) -> W:
    """The same weights, so that the block computes in float32."""
    values = ((field.name, getattr(weights, field.name)) for field in fields(weights))
    return with_tensors(weights, {name: value.float() for name, value in values if isinstance(value, Tensor)})


def _spread(units: list[int], width: int, device: torch.device) -> Tensor:
    """Row indices of the given units of ``width`` rows each."""
    starts = torch.tensor(units, dtype=torch.long, device=device) * width
    return (starts[:, None] + torch.arange(width, device=device)).flatten()
