"""Patterns: the shapes of what is removed. To add one: its own file, a line in ``catalogue.PATTERNS``, a subclass of its suite."""

from __future__ import annotations

from selfpruner import catalogue
from selfpruner.architectures import Architecture
from selfpruner.config import SearchConfig
from selfpruner.pruning.patterns.base import Pattern, Prunable
from selfpruner.pruning.patterns.masked import PrunableMasked
from selfpruner.pruning.patterns.units import (
    AttentionFactors,
    FfnFactors,
    PrunableAttention,
    PrunableFfn,
    attention_block,
    ffn_block,
    measure_attention,
    measure_ffn,
)

PATTERNS: dict[str, type[Pattern]] = {name: entry.load() for name, entry in catalogue.PATTERNS.items()}


def create(config: SearchConfig, arch: Architecture) -> Pattern:
    """The pattern that ``config`` asks for."""
    return PATTERNS[config.pattern](config, arch)


__all__ = [
    "PATTERNS",
    "AttentionFactors",
    "FfnFactors",
    "Pattern",
    "Prunable",
    "PrunableAttention",
    "PrunableFfn",
    "PrunableMasked",
    "attention_block",
    "create",
    "ffn_block",
    "measure_attention",
    "measure_ffn",
]
