"""Structured pruning of one layer: which units each level keeps, and the narrow weights it computes with.

FFN levels are prefixes of one keep-first order. The model's own channels are put in that order, in place, so a level's gate and up
are views of the model's weights and only its down is a matrix of its own. Attention options are few and are cut out on demand. Both
give plain block weights that the architecture's functions run.

What is measured once per layer (orders, errors, repairs) are *factors*; the levels are decided afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights
from selfpruner.architectures.cost import attention_cost, ffn_cost
from selfpruner.architectures.order import checkpoint_ffn, reorder_channels
from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation import Compensation, NestedRepair, SubsetRepair
from selfpruner.compensation.base import TYPICAL, output_energy
from selfpruner.criteria import Evidence, Heads, Matrix, UnitCriterion
from selfpruner.models.memory import release
from selfpruner.planning.space import Option, without_dominated
from selfpruner.stages import at

Weights = AttentionWeights | FfnWeights | None


@dataclass(frozen=True, slots=True)
class FfnFactors:
    """``order`` (F,): the checkpoint's channels, the ones to keep longest first; ``errors`` (F + 1,) left when the first k stay,
    as a share of the block's output."""

    order: Tensor
    errors: Tensor
    repair: NestedRepair


@dataclass(frozen=True, slots=True)
class AttentionFactors:
    """The query heads that every shape (KV groups, heads per group) keeps, ascending, and the share of the output that is lost."""

    heads: Mapping[tuple[int, int], Sequence[int]]
    errors: Mapping[tuple[int, int], float]
    repair: SubsetRepair


@dataclass(frozen=True, slots=True)
class PrunableFfn:
    """The FFN of a layer at every level. ``order`` (F,) is the keep-first order of the checkpoint's channels."""

    arch: Architecture
    layer: int
    order: Tensor
    repair: NestedRepair
    options: tuple[Option, ...]

    def weights(self, level: int) -> FfnWeights | None:
        """The block's weights at ``level`` in the model's dtype; None where the level drops the block."""
        channels = self.options[level].channels
        if channels == 0:
            return None
        base = self._base()
        if level == 0:
            return base
        W, bias = self.repair.weights(channels, base.down)
        cut = base.first_channels(channels)
        return replace(cut, down=W.to(self.arch.dtype), down_bias=_add(base.down_bias, bias, self.arch.dtype))

    def renewed(self, level: int, weights: Weights) -> FfnWeights | None:
        """What :meth:`weights` gave earlier, with its views of the model taken again."""
        if weights is None:
            return None
        assert isinstance(weights, FfnWeights)
        base = self._base()
        if level == 0:
            return base
        return replace(base.first_channels(self.options[level].channels), down=weights.down, down_bias=weights.down_bias)

    def own_bytes(self, weights: Weights) -> int:
        """Bytes of a level that are not the model's: gate and up are views of the ordered channels and cost nothing more."""
        return 0 if weights is None else _bytes(weights, "down", "down_bias")

    def columns(self, level: int) -> slice | Tensor | None:
        """Which of the dense block's channels the level has, as they are."""
        return slice(self.options[level].channels)

    def _base(self) -> FfnWeights:
        # Another session may have used the model with an order of its own; or it may be a layer that was just read.
        reorder_channels(self.arch, self.layer, self.order)
        return self.arch.ffn(self.layer)


@dataclass(frozen=True, slots=True)
class PrunableAttention:
    """The attention of a layer at every level. ``heads`` gives the query heads each option keeps, ascending."""

    arch: Architecture
    layer: int
    repair: SubsetRepair
    heads: tuple[tuple[int, ...], ...]
    options: tuple[Option, ...]

    def weights(self, level: int) -> AttentionWeights | None:
        """The block's weights at ``level`` in the model's dtype; None where the level drops the block."""
        option = self.options[level]
        if option.heads == 0:
            return None
        base = self.arch.attention(self.layer)
        if level == 0:
            return base
        heads = list(self.heads[level])
        W, bias = self.repair.weights(_columns(heads, base.head_dim, self.arch.device), base.o)
        cut = base.keep_heads(heads, option.kv_groups, option.heads_per_group)
        return replace(cut, o=W.to(self.arch.dtype), o_bias=_add(base.o_bias, bias, self.arch.dtype))

    def renewed(self, level: int, weights: Weights) -> AttentionWeights | None:
        """What :meth:`weights` gave earlier, with its views of the model taken again."""
        assert not isinstance(weights, FfnWeights)
        return self.arch.attention(self.layer) if level == 0 else weights

    def own_bytes(self, weights: Weights) -> int:
        """Bytes of a level that are not the model's."""
        return 0 if weights is None else _bytes(weights, "q", "k", "v", "o", "o_bias")

    def columns(self, level: int) -> slice | Tensor | None:
        """Which of the inputs of the dense block's output matrix, head by head, the level has, as they are."""
        return slice(None) if level == 0 else _columns(self.heads[level], self.arch.head_dim, self.arch.device)


def measure_ffn(
    arch: Architecture,
    layer: int,
    stats: BlockStatistics,
    criterion: UnitCriterion,
    compensation: Compensation,
    gradients: Mapping[str, Gradients] | None = None,
) -> FfnFactors:
    """Order the channels and make the repair. ``gradients`` by matrix name, for criteria that need them."""
    release()  # large matrices come and go here and before; what the last ones left must not add to the next ones
    base = checkpoint_ffn(arch, layer)
    W = base.down.to(stats.mean)
    whole = max(output_energy(W, stats), torch.finfo(torch.float32).tiny)
    order = criterion.order_channels(Evidence(W, stats, _coupled(base, stats, gradients)))
    release()
    with at("factors"):
        repair = compensation.nested(W, stats, order)
        errors = repair.errors() / whole
    errors[0], errors[-1] = 1.0, 0.0
    return FfnFactors(order, errors, repair)


def measure_attention(
    arch: Architecture,
    layer: int,
    stats: BlockStatistics,
    criterion: UnitCriterion,
    compensation: Compensation,
    gradients: Mapping[str, Gradients] | None = None,
) -> AttentionFactors:
    """Choose the heads of every shape and make the repair. ``gradients`` by matrix name, for criteria that need them."""
    base = arch.attention(layer)
    W = base.o.to(stats.mean)
    whole = max(output_energy(W, stats), torch.finfo(torch.float32).tiny)
    evidence = Evidence(W, stats, _coupled(base, stats, gradients))
    heads = criterion.choose_heads(evidence, Heads(base.kv_groups, base.heads_per_group, base.head_dim))
    dense = (base.kv_groups, base.heads_per_group)
    typical = min(heads, key=lambda shape: (abs(shape[0] * shape[1] / (dense[0] * dense[1]) - TYPICAL), shape))
    with at("factors"):
        repair = compensation.subset(W, stats, _columns(heads[typical], base.head_dim, W.device))
        errors = {
            shape: 0.0 if shape == dense else repair.error(_columns(kept, base.head_dim, W.device), W) / whole
            for shape, kept in heads.items()
        }
    return AttentionFactors(heads, errors, repair)


def ffn_block(arch: Architecture, layer: int, factors: FfnFactors, widths: Sequence[int], *, adds_bias: bool) -> PrunableFfn:
    """One option per width (dense first); the model's channels are put in order. ``adds_bias``: a pruned block gets an output
    bias, which counts."""
    extra = arch.hidden if adds_bias and not arch.has_bias(layer, "down") else 0
    errors = factors.errors.tolist()
    options = tuple(
        Option(
            parameters=ffn_cost(arch, width) + (extra if 0 < width < arch.channels else 0),
            error=errors[width],
            channels=width,
        )
        for width in widths
    )
    order = factors.order.to(arch.device)
    reorder_channels(arch, layer, order)
    return PrunableFfn(arch, layer, order, factors.repair, options)


def attention_block(
    arch: Architecture, layer: int, factors: AttentionFactors, shapes: Sequence[tuple[int, int]], *, adds_bias: bool
) -> PrunableAttention:
    """One option per shape, without those that a smaller one beats on error."""
    extra = arch.hidden if adds_bias and not arch.has_bias(layer, "o") else 0
    dense = (arch.kv_groups, arch.heads_per_group)
    options = []
    for groups, per_group in shapes:
        error = factors.errors[groups, per_group] if groups else 1.0
        parameters = attention_cost(arch, groups, per_group)
        parameters += extra if groups and (groups, per_group) != dense else 0
        options.append(Option(parameters, error, kv_groups=groups, heads_per_group=per_group))
    chosen = without_dominated(options)
    heads = tuple(tuple(factors.heads[o.kv_groups, o.heads_per_group]) if o.heads else () for o in chosen)
    return PrunableAttention(arch, layer, factors.repair, heads, chosen)


def _coupled(
    weights: AttentionWeights | FfnWeights, stats: BlockStatistics, gradients: Mapping[str, Gradients] | None
) -> dict[str, Matrix]:
    """The block's matrices with their gradients; of the last one, the output matrix, with its inputs' statistics."""
    if gradients is None:
        return {}
    names = weights.matrices
    return {
        name: Matrix(name, getattr(weights, name).float(), stats if name == names[-1] else None, gradients[name]) for name in names
    }


def _bytes(weights: AttentionWeights | FfnWeights, *names: str) -> int:
    tensors = (getattr(weights, name) for name in names)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _columns(heads: Sequence[int], width: int, device: torch.device) -> Tensor:
    starts = torch.tensor(heads, dtype=torch.long, device=device) * width
    return (starts[:, None] + torch.arange(width, device=device)).flatten()


def _add(base: Tensor | None, extra: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if extra is None:
        return base
    return (extra if base is None else base.to(extra) + extra).to(dtype)
