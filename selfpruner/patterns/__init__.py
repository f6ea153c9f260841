"""Patterns: the shapes of what is removed. ``structured`` cuts out whole units; its blocks run narrower matrices."""

from selfpruner.patterns.structured import PrunableAttention, PrunableFfn, prepare_attention, prepare_ffn

__all__ = ["PrunableAttention", "PrunableFfn", "prepare_attention", "prepare_ffn"]
