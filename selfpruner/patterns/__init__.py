"""Patterns: the shapes of what is removed. ``structured`` cuts out whole units; its blocks run narrower matrices."""

from selfpruner.patterns.structured import (
    AttentionFactors,
    FfnFactors,
    PrunableAttention,
    PrunableFfn,
    attention_block,
    ffn_block,
    measure_attention,
    measure_ffn,
    prepare_attention,
    prepare_ffn,
)

__all__ = [
    "AttentionFactors",
    "FfnFactors",
    "PrunableAttention",
    "PrunableFfn",
    "attention_block",
    "ffn_block",
    "measure_attention",
    "measure_ffn",
    "prepare_attention",
    "prepare_ffn",
]
