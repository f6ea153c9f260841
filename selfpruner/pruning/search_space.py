"""The search space of a model under a config: which levels its blocks have, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence

from selfpruner.architectures import Architecture
from selfpruner.config import SearchConfig
from selfpruner.planning.space import Block, Kind, Option, SearchSpace
from selfpruner.pruning import patterns
from selfpruner.pruning.patterns import Prunable


def expected_space(config: SearchConfig, arch: Architecture) -> SearchSpace:
    """The space as it is known before anything is measured: without errors, and with the shapes that a smaller one will beat.
    Raises BudgetError for a rate that cannot be met."""
    pattern = patterns.create(config, arch)
    return _space(config, arch, [pattern.expected(index // 2, index % 2) for index in range(2 * arch.layers)])


def space_of(config: SearchConfig, arch: Architecture, blocks: Sequence[Prunable]) -> SearchSpace:
    """The search space of prepared blocks, in plan order."""
    return _space(config, arch, [block.options for block in blocks])


def whole_shape(arch: Architecture) -> tuple[int, int]:
    """The dense model's KV groups and query heads per group."""
    return arch.kv_groups, arch.heads_per_group


def _space(config: SearchConfig, arch: Architecture, options: Sequence[Sequence[Option]]) -> SearchSpace:
    kinds: tuple[Kind, Kind] = ("attention", "ffn")
    blocks = tuple(Block(index // 2, kinds[index % 2], tuple(choices)) for index, choices in enumerate(options))
    pattern = patterns.create(config, arch)
    return SearchSpace(blocks, pattern.whole(blocks), config.rate, pattern.step(blocks), config.granularity)
