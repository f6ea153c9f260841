"""Search spaces without a model: the options a real layer would have, with made-up errors. Imports no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack

from selfpruner.planning.space import Block, Option, SearchSpace, attention_shapes, ffn_widths, without_dominated

Mode = Literal["all", "q_head", "kv_group", "none"]


class SpaceShape(TypedDict, total=False):
    """Arguments of :func:`space_of`."""

    layers: int
    hidden: int
    channels: int
    step: int
    kv_groups: int
    heads_per_group: int
    head_dim: int
    mode: Mode
    drop: bool
    bias: bool
    ranks: int
    rate: float
    granularity: Literal["layer", "block"]
    seed: int


def space_of(
    *,
    layers: int = 4,
    hidden: int = 32,
    channels: int = 96,
    step: int = 8,
    kv_groups: int = 2,
    heads_per_group: int = 2,
    head_dim: int = 8,
    mode: Mode = "all",
    drop: bool = False,
    bias: bool = False,
    ranks: int = 1,
    rate: float = 0.2,
    granularity: Literal["layer", "block"] = "block",
    seed: int = 0,
) -> SearchSpace:
    """A space with the costs of a model of this shape. ``bias``: pruned blocks get a bias, as compensation gives them.

    Errors rise with what is removed, at a speed of each block's own.
    """
    rng = random.Random(seed)
    dense = (kv_groups, heads_per_group)

    def attention(groups: int, heads: int) -> int:
        cost = 2 * groups * (heads + 1) * head_dim * hidden
        return 0 if groups == 0 else cost + hidden * (bias and (groups, heads) != dense)

    def ffn(width: int) -> int:
        return 0 if width == 0 else 3 * width * hidden + hidden * (bias and width < channels)

    def error(parameters: int, whole: int, slope: float) -> float:
        return slope * math.pow(1 - parameters / whole, 1.5)

    blocks = []
    for layer in range(layers):
        slope, wide = rng.uniform(0.3, 1.0), attention(*dense)
        sizes = [(g, h, attention(g, h)) for g, h in attention_shapes(*dense, mode, drop=drop, ranks=ranks)]
        heads = [Option(size, error(size, wide, slope), kv_groups=g, heads_per_group=h) for g, h, size in sizes]
        blocks.append(Block(layer, "attention", without_dominated(heads)))
        slope = rng.uniform(0.3, 1.0)
        widths = ffn_widths(channels, step, drop=drop, ranks=ranks)
        sized = [Option(ffn(w), error(ffn(w), ffn(channels), slope), channels=w) for w in widths]
        blocks.append(Block(layer, "ffn", tuple(sized)))
    total = sum(block.options[0].parameters for block in blocks) + 2 * hidden * layers
    return SearchSpace(tuple(blocks), total, rate, 3 * step * hidden, granularity)


def positions(space: SearchSpace, levels: Sequence[int]) -> list[int]:
    """Where each dial of ``space`` stands in a plan."""
    return [dial.settings.index(tuple(levels[block] for block in dial.blocks)) for dial in space.dials]


def shape(**changes: Unpack[SpaceShape]) -> SpaceShape:
    """That of SmolLM2-135M."""
    smollm: SpaceShape = {
        "layers": 30,
        "hidden": 576,
        "channels": 1536,
        "step": 64,
        "kv_groups": 3,
        "heads_per_group": 3,
        "head_dim": 64,
    }
    return {**smollm, **changes}
