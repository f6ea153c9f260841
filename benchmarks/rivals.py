"""How a generation is scored without the engine, with plain transformers: a pruned copy per candidate, or masks in one model.

Both keep the dense model's logits of the generation's tokens and take the exact KL from them, as EvoPress does, 128 positions at a
time so that temporaries stay in a cache. Both use as wide a forward as is useful, and neither multiplies anything it need not: the
copy is as narrow as its plan and shares every tensor that was not pruned; the masked model rewrites only the blocks in which a
candidate differs from the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights
from selfpruner.evaluation.engine import Engine
from selfpruner.export.build import build
from selfpruner.export.pruned import pruned_tensors
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.pruning.patterns import PrunableAttention, PrunableFfn

# Tokens of one forward pass, and positions whose logits are compared at once.
WIDE, POSITIONS = 2048, 128


@torch.inference_mode()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """(sequences, length, V) in the model's dtype."""
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in tokens.split(max(1, WIDE // tokens.shape[1]))])


@torch.inference_mode()
def divergence(model: Any, dense: Tensor, tokens: Tensor) -> float:
    """KL(dense || model) per token."""
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    wide = max(1, WIDE // tokens.shape[1])
    for ids, wanted in zip(tokens.split(wide), dense.split(wide), strict=True):
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        for h, z in zip(states.split(POSITIONS), wanted.flatten(0, 1).split(POSITIONS), strict=True):
            p, q = z.float().log_softmax(-1), model.lm_head(h).float().log_softmax(-1)
            total += nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).double().sum()
    return float(total) / tokens.numel()


def naive(
    arch: Architecture, blocks: Sequence[PrunableAttention | PrunableFfn], space: SearchSpace, plans: Sequence[Plan], tokens: Tensor
) -> list[float]:
    """(a): per candidate a narrow model as the exporter builds it, a full forward, the exact KL."""
    source: Any = SimpleNamespace(space=space, arch=arch, engine=Engine(arch, blocks, cache_bytes=0))
    dense = logits_of(arch.model, tokens)
    found = []
    for plan in plans:
        with torch.no_grad():
            model = build(arch.model, *pruned_tensors(source, plan))
        found.append(divergence(model, dense, tokens))
        del model
    return found


def masked(
    arch: Architecture, blocks: Sequence[PrunableAttention | PrunableFfn], plans: Sequence[Plan], tokens: Tensor
) -> list[float]:
    """(b): per candidate zeros and repaired columns in the output matrices of one full-width model, a full forward, exact KL."""
    dense = logits_of(arch.model, tokens)
    masks = _Masks(arch, blocks)
    found = []
    try:
        for plan in plans:
            masks.set(plan.levels)
            found.append(divergence(arch.model, dense, tokens))
    finally:
        masks.set((0,) * len(blocks))
    return found


class _Masks:
    """The model's own output matrices, rewritten block by block; the dense ones are kept where they were replaced."""

    def __init__(self, arch: Architecture, blocks: Sequence[PrunableAttention | PrunableFfn]) -> None:
        self.arch, self.blocks = arch, blocks
        self.levels = [0] * len(blocks)
        self.saved: dict[int, tuple[Tensor, nn.Parameter | None]] = {}

    @torch.no_grad()
    def set(self, levels: Sequence[int]) -> None:
        for index, level in enumerate(levels):
            if level != self.levels[index]:
                self._write(index, level)
                self.levels[index] = level

    def _write(self, index: int, level: int) -> None:
        layer: Any = self.arch.decoder.layers[index // 2]
        module = layer.mlp.down_proj if index % 2 else layer.self_attn.o_proj
        if index not in self.saved:
            self.saved[index] = module.weight.clone(), module.bias
        weight, module.bias = self.saved[index]
        module.weight.copy_(weight)  # a level is made from the dense matrix
        if level == 0:
            return
        block = self.blocks[index]
        weights = block.weights(level)
        module.weight.zero_()
        bias = None
        if isinstance(weights, FfnWeights):
            module.weight[:, : weights.down.shape[1]] = weights.down
            bias = weights.down_bias
        elif isinstance(weights, AttentionWeights):
            assert isinstance(block, PrunableAttention)
            width = self.arch.head_dim
            for place, head in enumerate(block.heads[level]):
                module.weight[:, head * width : (head + 1) * width] = weights.o[:, place * width : (place + 1) * width]
            bias = weights.o_bias
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
