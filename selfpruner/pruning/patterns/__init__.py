"""Patterns: the shapes of what is removed. ``structured`` cuts out whole units, and its blocks run narrower matrices; ``n_m`` and
``unstructured`` make weights zero. To the engine a block of either is a :class:`Prunable`: a level is a level."""

from selfpruner.pruning.patterns.masked import PrunableMasked
from selfpruner.pruning.patterns.structured import (
    AttentionFactors,
    FfnFactors,
    PrunableAttention,
    PrunableFfn,
    attention_block,
    ffn_block,
    measure_attention,
    measure_ffn,
)

Prunable = PrunableAttention | PrunableFfn | PrunableMasked

__all__ = [
    "AttentionFactors",
    "FfnFactors",
    "Prunable",
    "PrunableAttention",
    "PrunableFfn",
    "PrunableMasked",
    "attention_block",
    "ffn_block",
    "measure_attention",
    "measure_ffn",
]
