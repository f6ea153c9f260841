"""Structured pruning of one layer: which units each level keeps, and the narrow weights it computes with.

FFN levels are prefixes of one keep-first order, so the channels are put in that order once and a level's gate and up are views.
Attention options are few and are cut out on demand. Both give plain block weights that the architecture's functions run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights
from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation import Compensation, NestedRepair, SubsetRepair
from selfpruner.compensation.base import energy
from selfpruner.criteria import Criterion, Heads
from selfpruner.space import Option, without_dominated


@dataclass(frozen=True, slots=True)
class PrunableFfn:
    """The FFN of a layer at every level. ``order`` (F,) is the keep-first order of the model's channels."""

    base: FfnWeights
    ordered: FfnWeights
    order: Tensor
    repair: NestedRepair
    options: tuple[Option, ...]

    def weights(self, level: int) -> FfnWeights | None:
        """The block's weights at ``level`` in the model's dtype; None where the level drops the block."""
        channels = self.options[level].channels
        if level == 0:
            return self.base
        if channels == 0:
            return None
        W, bias = self.repair.weights(channels)
        cut = self.ordered.first_channels(channels)
        return replace(cut, down=W.to(self.base.down.dtype), down_bias=_add(self.base.down_bias, bias, self.base.down.dtype))


@dataclass(frozen=True, slots=True)
class PrunableAttention:
    """The attention of a layer at every level. ``heads`` gives the query heads each option keeps, ascending."""

    base: AttentionWeights
    repair: SubsetRepair
    heads: tuple[tuple[int, ...], ...]
    options: tuple[Option, ...]

    def weights(self, level: int) -> AttentionWeights | None:
        """The block's weights at ``level`` in the model's dtype; None where the level drops the block."""
        option = self.options[level]
        if level == 0:
            return self.base
        if option.heads == 0:
            return None
        heads = list(self.heads[level])
        W, bias = self.repair.weights(_columns(heads, self.base.head_dim, self.base.o.device))
        cut = self.base.keep_heads(heads, option.kv_groups, option.heads_per_group)
        return replace(cut, o=W.to(self.base.o.dtype), o_bias=_add(self.base.o_bias, bias, self.base.o.dtype))


def prepare_ffn(
    arch: Architecture,
    layer: int,
    stats: BlockStatistics,
    criterion: Criterion,
    compensation: Compensation,
    widths: Sequence[int],
) -> PrunableFfn:
    """Order the channels, make the repair, and describe one option per width (dense first)."""
    base = arch.ffn(layer)
    W = base.down.to(stats.gram.dtype)
    order = criterion.order_channels(W, stats)
    repair = compensation.nested(W, stats, order)
    whole = max(energy(W, stats.gram), torch.finfo(torch.float32).tiny)
    left = repair.errors() / whole
    extra = arch.hidden if compensation.adds_bias and base.down_bias is None else 0
    options = tuple(
        Option(
            parameters=arch.ffn_cost(width) + (extra if 0 < width < arch.channels else 0),
            error=0.0 if width == arch.channels else float(left[width]) if width else 1.0,
            channels=width,
        )
        for width in widths
    )
    # What down becomes is the repair's business; the model's own stands in its place, so that no second copy is kept.
    ordered = replace(base.in_order(order), down=base.down)
    return PrunableFfn(base, ordered, order, repair, options)


def prepare_attention(
    arch: Architecture,
    layer: int,
    stats: BlockStatistics,
    criterion: Criterion,
    compensation: Compensation,
    shapes: Sequence[tuple[int, int]],
) -> PrunableAttention:
    """Choose the heads of every option, make the repair, and leave out options that a smaller one beats on error."""
    base = arch.attention(layer)
    W = base.o.to(stats.gram.dtype)
    kept = criterion.choose_heads(W, stats, Heads(base.kv_groups, base.heads_per_group, base.head_dim))
    repair = compensation.subset(W, stats)
    whole = max(energy(W, stats.gram), torch.finfo(torch.float32).tiny)
    extra = arch.hidden if compensation.adds_bias and base.o_bias is None else 0
    dense = (base.kv_groups, base.heads_per_group)
    options = []
    for groups, per_group in shapes:
        error = 0.0
        if groups == 0:
            error = 1.0
        elif (groups, per_group) != dense:
            error = repair.error(_columns(kept[groups, per_group], base.head_dim, W.device)) / whole
        parameters = arch.attention_cost(groups, per_group)
        parameters += extra if groups and (groups, per_group) != dense else 0
        options.append(Option(parameters, error, kv_groups=groups, heads_per_group=per_group))
    chosen = without_dominated(options)
    heads = tuple(tuple(kept[o.kv_groups, o.heads_per_group]) if o.heads else () for o in chosen)
    return PrunableAttention(base, repair, heads, chosen)


def _columns(heads: Sequence[int], width: int, device: torch.device) -> Tensor:
    starts = torch.tensor(heads, dtype=torch.long, device=device) * width
    return (starts[:, None] + torch.arange(width, device=device)).flatten()


def _add(base: Tensor | None, extra: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if extra is None:
        return base
    return (extra if base is None else base.to(extra) + extra).to(dtype)
