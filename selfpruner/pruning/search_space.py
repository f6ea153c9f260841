"""The search space of a model under a config: which levels its blocks have, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from selfpruner.architectures import Architecture
from selfpruner.architectures.cost import attention_cost, decoder_parameters, ffn_cost, model_parameters
from selfpruner.config import SearchConfig
from selfpruner.criteria.masks import Sparsity
from selfpruner.planning.space import Block, Option, SearchSpace, attention_shapes, default_ffn_step, ffn_widths
from selfpruner.pruning.patterns import (
    Prunable,
    masked,
)


def expected_space(config: SearchConfig, arch: Architecture) -> SearchSpace:
    """The space as it is known before anything is measured: without errors, and with the shapes that a smaller one will beat.
    Raises BudgetError for a rate that cannot be met."""
    return _space(config, arch, [_free_block(config, arch, index) for index in range(2 * arch.layers)])


def space_of(config: SearchConfig, arch: Architecture, blocks: Sequence[Prunable]) -> SearchSpace:
    """The search space of prepared blocks, in plan order."""
    return _space(config, arch, [Block(index // 2, _kind(index), block.options) for index, block in enumerate(blocks)])


def sparsity_levels(config: SearchConfig) -> list[Sparsity]:
    return masked.sparsities(config.pattern, config.group, config.sparsity_step, drop=config.drop_blocks)


def _kind(index: int) -> Any:
    return "ffn" if index % 2 else "attention"


def whole_shape(arch: Architecture) -> tuple[int, int]:
    """The dense model's KV groups and query heads per group."""
    return arch.kv_groups, arch.heads_per_group


def attention_choices(config: SearchConfig, arch: Architecture) -> list[tuple[int, int]]:
    return attention_shapes(*whole_shape(arch), config.attention, drop=config.drop_blocks, ranks=config.tensor_parallel)


def ffn_choices(config: SearchConfig, arch: Architecture) -> list[int]:
    return ffn_widths(arch.channels, config.ffn_step, drop=config.drop_blocks, ranks=config.tensor_parallel)


def _free_block(config: SearchConfig, arch: Architecture, index: int) -> Block:
    """A block's sizes without errors, for the first look at the budget."""
    if config.pattern != "structured":
        options = masked.block_options(arch, index // 2, index % 2, sparsity_levels(config))
        return Block(index // 2, _kind(index), options[:1] if config.attention == "none" and index % 2 == 0 else options)
    if index % 2:
        return Block(index // 2, "ffn", tuple(Option(ffn_cost(arch, width), channels=width) for width in ffn_choices(config, arch)))
    sizes = sorted({attention_cost(arch, *shape) for shape in attention_choices(config, arch)}, reverse=True)
    return Block(index // 2, "attention", tuple(Option(size) for size in sizes))


def _space(config: SearchConfig, arch: Architecture, blocks: Sequence[Block]) -> SearchSpace:
    if config.pattern != "structured":
        # Of the matrices that are pruned, as sparsity is customarily said: 2:4 everywhere is a rate of a half.
        whole = sum(block.options[0].parameters for block in blocks)
        sizes = [option.parameters for option in blocks[1].options]
        step = max(before - after for before, after in pairwise(sizes))
        return SearchSpace(tuple(blocks), whole, config.rate, step, config.granularity)
    total = decoder_parameters(arch) if config.of == "decoder" else model_parameters(arch)
    channels = config.ffn_step or default_ffn_step(arch.channels, config.tensor_parallel)
    step = ffn_cost(arch, 2 * channels) - ffn_cost(arch, channels)
    return SearchSpace(tuple(blocks), total, config.rate, step, config.granularity)
