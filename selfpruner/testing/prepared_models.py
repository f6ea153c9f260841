"""Tiny models prepared for pruning: statistics, every block at every level, the space and an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from selfpruner import compensation, criteria
from selfpruner.architectures import Architecture, describe
from selfpruner.architectures.cost import decoder_parameters, ffn_cost
from selfpruner.calibration.statistics import BlockStatistics, layer_statistics
from selfpruner.compensation import Compensation
from selfpruner.criteria import UnitCriterion
from selfpruner.evaluation.engine import Engine
from selfpruner.planning.space import Block, SearchSpace, attention_shapes, ffn_widths
from selfpruner.pruning.patterns import PrunableAttention, PrunableFfn, attention_block, ffn_block, measure_attention, measure_ffn
from selfpruner.testing.tiny_models import tokens_of


@dataclass(frozen=True)
class Ready:
    model: PreTrainedModel
    arch: Architecture
    statistics: list[tuple[BlockStatistics, BlockStatistics]]  # of attention and FFN, by layer
    blocks: list[PrunableAttention | PrunableFfn]
    space: SearchSpace
    engine: Engine
    compensation: str
    calibration: Tensor


def prepare_ffn(
    arch: Architecture,
    layer: int,
    stats: BlockStatistics,
    criterion: UnitCriterion,
    compensation: Compensation,
    widths: Sequence[int],
) -> PrunableFfn:
    """:func:`measure_ffn` and :func:`ffn_block` in one."""
    factors = measure_ffn(arch, layer, stats, criterion, compensation)
    return ffn_block(arch, layer, factors, widths, adds_bias=compensation.adds_bias)


def prepare_attention(
    arch: Architecture,
    layer: int,
    stats: BlockStatistics,
    criterion: UnitCriterion,
    compensation: Compensation,
    shapes: Sequence[tuple[int, int]],
) -> PrunableAttention:
    """:func:`measure_attention` and :func:`attention_block` in one."""
    factors = measure_attention(arch, layer, stats, criterion, compensation)
    return attention_block(arch, layer, factors, shapes, adds_bias=compensation.adds_bias)


def ready(
    model: PreTrainedModel,
    *,
    criterion: str = "obs",
    method: str = "least_squares",
    rate: float = 0.2,
    step: int = 8,
    drop: bool = False,
    calibration: Tensor | None = None,
    judged: bool = False,
    **engine: int | None,
) -> Ready:
    """Statistics on random tokens, every block at every level, the space and an engine. Unless ``judged`` no sequence judges a
    repair, so that the ridge is the constant one."""
    arch = describe(model)
    calibration = tokens_of(12, 32, seed=7) if calibration is None else calibration
    statistics = []
    for stats in layer_statistics(arch, calibration):
        pair = stats["attention"], stats["ffn"]
        statistics.append(pair if judged else (replace(pair[0], judge=None), replace(pair[1], judge=None)))
    blocks: list[PrunableAttention | PrunableFfn] = []
    order = criteria.create(criterion, "structured")
    assert isinstance(order, UnitCriterion)
    how = order, compensation.create(method)
    for layer, (attention, ffn) in enumerate(statistics):
        shapes = attention_shapes(arch.kv_groups, arch.heads_per_group, "all", drop=drop)
        blocks.append(prepare_attention(arch, layer, attention, *how, shapes))
        blocks.append(prepare_ffn(arch, layer, ffn, *how, ffn_widths(arch.channels, step, drop=drop)))
    kinds = ("attention", "ffn")
    space = SearchSpace(
        tuple(Block(i // 2, kinds[i % 2], block.options) for i, block in enumerate(blocks)),  # type: ignore[arg-type]
        decoder_parameters(arch),
        rate,
        ffn_cost(arch, 2 * step) - ffn_cost(arch, step),
    )
    return Ready(model, arch, statistics, blocks, space, Engine(arch, blocks, **engine), method, calibration)
