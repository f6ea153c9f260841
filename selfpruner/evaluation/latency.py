"""How long each block takes at each level on this device, so that a plan's latency is a sum.

The time of a block follows from its shape. All layers share the shapes, so a shape is timed on a few layers and counts for all; its
weights are the first ones of the dense block, whose values do not matter here. Shapes are timed in turn, round after round, so a
machine whose speed drifts slows all of them. The median round counts.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256

import torch

from selfpruner import compensation
from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights
from selfpruner.errors import CancelledTaskError, ConfigError
from selfpruner.evaluation.session import Prepared
from selfpruner.evaluation.speed import wait
from selfpruner.files import atomic
from selfpruner.files.cache_folder import use
from selfpruner.planning.space import Block, Option

Shape = tuple[str, int, int, int]
# Layers that take part, one a round.
LAYERS = 4
ROUNDS = 9


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """Microseconds of one prefill of ``tokens`` tokens at batch 1: per block and level, and of what no plan changes (embedding,
    final norm, head on the last position)."""

    tokens: int
    blocks: tuple[tuple[float, ...], ...]
    rest: float


def time_blocks(prepared: Prepared, tokens: int, *, cancelled: Callable[[], bool] = lambda: False) -> BlockTimes:
    """Times of all blocks of ``prepared`` at all levels, from its cache where they were measured before on this device.

    Kept because a job that is resumed has to make the same plans. Raises CancelledTaskError between blocks, ConfigError for a
    model that is streamed from its files, whose blocks take as long as reading them.
    """
    if prepared.loaded.streamed:
        raise ConfigError(
            f"{prepared.loaded.source.name} is streamed from its files, so its latency here says nothing about its plans. "
            "Give it more memory, or leave latency out of the objective.",
            param="objective",
        )
    file = prepared.cache / "latency" / f"{_key(prepared, tokens)}.json"
    use(file, prepared.loaded.source.name, "times of its blocks")
    if file.exists():
        known = json.loads(file.read_text())
        return BlockTimes(known["tokens"], tuple(map(tuple, known["blocks"])), known["rest"])
    seconds, rest = _measure(prepared, tokens, cancelled)
    blocks = tuple(
        tuple(round(1e6 * seconds[_shape(block, option)], 1) for option in block.options) for block in prepared.space.blocks
    )
    times = BlockTimes(tokens, blocks, round(1e6 * rest, 1))
    atomic.write_text(file, json.dumps(asdict(times)))
    return times


def _shape(block: Block, option: Option) -> Shape:
    return block.kind, option.kv_groups, option.heads_per_group, option.channels


def _key(prepared: Prepared, tokens: int) -> str:
    device = prepared.arch.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}:{torch.get_num_threads()}"
    shapes = [[_shape(block, option) for option in block.options] for block in prepared.space.blocks]
    parts = (prepared.loaded.source.fingerprint, str(prepared.arch.dtype), prepared.config.compensation, name, tokens, shapes)
    return sha256(json.dumps(parts).encode()).hexdigest()[:16]


@torch.inference_mode()
def _measure(prepared: Prepared, tokens: int, cancelled: Callable[[], bool]) -> tuple[dict[Shape, float], float]:
    """Median seconds per shape, and of the rest."""
    arch, space = prepared.arch, prepared.space
    layers: dict[Shape, list[int]] = {}
    for block in space.blocks:
        for option in block.options:
            layers.setdefault(_shape(block, option), []).append(block.layer)
    chosen = {shape: _spread(samples) for shape, samples in layers.items()}
    adds_bias = compensation.create(prepared.config.compensation).adds_bias
    rope = arch.rope(tokens)
    ids = torch.arange(tokens, device=arch.device)[None] % arch.vocabulary
    x = arch.embed(ids)

    def run(layer: int, shape: Shape) -> float:
        weights = _weights(arch, layer, shape, adds_bias)
        wait(arch.device)
        started = time.perf_counter()
        if isinstance(weights, FfnWeights):
            arch.feed_forward(layer, x, weights)
        else:
            arch.attend(layer, x, weights, rope)
        wait(arch.device)
        return time.perf_counter() - started

    def ends() -> float:
        wait(arch.device)
        started = time.perf_counter()
        arch.logits(arch.final_norm(arch.embed(ids)[:, -1:]))
        wait(arch.device)
        return time.perf_counter() - started

    samples: dict[Shape, list[float]] = {shape: [] for shape in chosen}
    rest = []
    for number in range(ROUNDS + 1):
        for shape, where in chosen.items():
            if cancelled():
                raise CancelledTaskError("Cancelled while timing blocks.")
            seconds = run(where[number % len(where)], shape)
            if number:  # the first round warms up
                samples[shape].append(seconds)
        last = ends()
        if number:
            rest.append(last)
    return {shape: statistics.median(times) for shape, times in samples.items()}, statistics.median(rest)


def _spread(layers: list[int]) -> list[int]:
    """At most ``LAYERS`` of them, over the whole depth."""
    count = min(LAYERS, len(layers))
    return [layers[step * len(layers) // count] for step in range(count)]


def _weights(arch: Architecture, layer: int, shape: Shape, adds_bias: bool) -> AttentionWeights | FfnWeights | None:
    """A block of this shape as a plan's would be; None where it is dropped."""
    kind, groups, heads, channels = shape
    extra = torch.zeros(arch.hidden, dtype=arch.dtype, device=arch.device) if adds_bias else None
    if kind == "ffn":
        ffn = arch.ffn(layer)
        if channels in (0, arch.channels):
            return ffn if channels else None
        cut = ffn.first_channels(channels)
        return replace(cut, down=cut.down.contiguous(), down_bias=cut.down_bias if extra is None else extra)
    attention = arch.attention(layer)
    if groups * heads in (0, arch.heads):
        return attention if groups else None
    kept = [group * arch.heads_per_group + head for group in range(groups) for head in range(heads)]
    fewer = attention.keep_heads(kept, groups, heads)
    return replace(fewer, o=fewer.o.contiguous(), o_bias=fewer.o_bias if extra is None else extra)
