"""What a plan makes of a prepared model: layer shapes, and the tensors that differ from the dense model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner import compensation
from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights, describe, in_float32
from selfpruner.architectures.kernels import soft_cap
from selfpruner.architectures.order import checkpoint_ffn, restore_channels
from selfpruner.calibration.soundness import finite
from selfpruner.errors import ExportError
from selfpruner.evaluation.session import Prepared, make_engine
from selfpruner.export.build import outline
from selfpruner.export.checkpoint import TensorSource
from selfpruner.models import LoadedModel, as_written
from selfpruner.planning.space import Plan
from selfpruner.pruning.layer_shapes import KeptUnits, LayerShape
from selfpruner.pruning.measurements import held_bytes
from selfpruner.pruning.patterns import (
    Prunable,
    PrunableAttention,
    PrunableFfn,
    PrunableMasked,
)
from selfpruner.pruning.search_space import whole_shape


def pruned_tensors(prepared: Prepared, plan: Plan) -> tuple[list[LayerShape], dict[str, Tensor]]:
    """Layer shapes and the tensors that differ from the dense model, under their checkpoint names."""
    prepared.space.check(plan)
    shapes, tensors = [], {}
    if isinstance(prepared.engine.blocks[0], PrunableMasked):
        arch = prepared.arch
        restore_channels(arch)  # a block that stayed dense is written as it was
        return [LayerShape(*whole_shape(arch), arch.channels)] * arch.layers, dict(_masked_tensors(prepared, plan))
    for layer in range(prepared.arch.layers):
        levels = plan.levels[2 * layer], plan.levels[2 * layer + 1]
        attention = prepared.space.blocks[2 * layer].options[levels[0]]
        ffn = prepared.space.blocks[2 * layer + 1].options[levels[1]]
        shapes.append(LayerShape(attention.kv_groups, attention.heads_per_group, ffn.channels))
        for index, level in zip((2 * layer, 2 * layer + 1), levels, strict=True):
            if level:
                tensors.update(_named(prepared.arch, layer, prepared.engine.weights(index, level)))
            elif index % 2:  # an untouched layer is written as it was, its channels in the checkpoint's order
                tensors.update(_named(prepared.arch, layer, checkpoint_ffn(prepared.arch, layer)))
    return shapes, tensors


def kept_units(prepared: Prepared, plan: Plan) -> KeptUnits | None:
    """The units that ``plan`` keeps, in the order in which :func:`pruned_tensors` has them; None where shapes stay."""
    arch, kept = prepared.arch, []
    for layer in range(arch.layers):
        attention, ffn = prepared.engine.blocks[2 * layer], prepared.engine.blocks[2 * layer + 1]
        if not (isinstance(attention, PrunableAttention) and isinstance(ffn, PrunableFfn)):
            return None
        one, other = plan.levels[2 * layer], plan.levels[2 * layer + 1]
        heads = list(attention.heads[one]) if one else None
        channels = ffn.order[: ffn.options[other].channels].tolist() if other else None
        kept.append((heads, channels))
    return KeptUnits(LayerShape(*whole_shape(arch), arch.channels), kept)


def zeros(prepared: Prepared, plan: Plan) -> int:
    """Weights that are zero in the blocks that ``plan`` prunes."""
    matrices = (tensor for _, tensor in _masked_tensors(prepared, plan))
    return sum(int((tensor == 0).sum()) for tensor in matrices)


def _masked_tensors(prepared: Prepared, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The matrices of the blocks that ``plan`` prunes by making weights zero, under their checkpoint names."""
    for block, level in enumerate(plan.levels):
        if level:
            tensors = _named(prepared.arch, block // 2, prepared.engine.weights(block, level))
            yield from ((name, tensor) for name, tensor in tensors.items() if name.endswith(".weight"))


def streamed_export(prepared: Prepared, plan: Plan) -> tuple[PreTrainedModel, TensorSource]:
    """The pruned model without its weights, and where they come from one by one: from the model's files, in the type that the
    checkpoint has, whatever was computed in."""
    prepared.space.check(plan)
    memory = (prepared.loaded.memory or 0) if prepared.loaded.streamed else None
    prepared = _as_written(prepared)
    arch, engine = prepared.arch, prepared.engine
    shapes, biases = [], set[str]()
    structured = not isinstance(engine.blocks[0], PrunableMasked)
    repaired = structured and compensation.create(prepared.config.compensation).adds_bias
    for layer in range(arch.layers):
        one, other = (prepared.space.blocks[block].options[plan.levels[block]] for block in (2 * layer, 2 * layer + 1))
        kept = (one.kv_groups, one.heads_per_group, other.channels) if structured else (*whole_shape(arch), arch.channels)
        shapes.append(LayerShape(*kept))
        for block, place in ((2 * layer, arch.layout.attention["o"]), (2 * layer + 1, arch.layout.ffn["down"])):
            if plan.levels[block] and repaired:
                biases.add(f"{arch.layout.layer(layer)}.{place}.bias")
    model = outline(prepared.loaded.model, shapes, biases, dtype=prepared.loaded.dtype)
    assert arch.stream is not None
    files = arch.stream.files
    held: dict[int, dict[str, Tensor]] = {}

    def tensor(name: str) -> Iterable[Tensor]:
        found = arch.layout.block_of(name)
        block = None if found is None else 2 * found[0] + found[1]
        if block is None or plan.levels[block] == 0:
            return files.pieces(name)
        if block not in held:
            held.clear()
            held[block] = _named(arch, block // 2, engine.weights(block, plan.levels[block]))
        if not finite(held[block][name]):
            raise ExportError(f"{name} has numbers that {arch.dtype} cannot hold. Ask for another dtype.", param="dtype")
        return [held[block][name]]

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        # In float32 like the verification, so that only the written files can differ.
        x, rope = arch.embed_exactly(tokens.to(arch.device)), arch.rope(tokens.shape[1])
        for block, level in enumerate(plan.levels):
            weights = engine.weights(block, level)
            if isinstance(weights, FfnWeights):
                x = arch.feed_forward(block // 2, x, in_float32(weights))
            elif weights is not None:
                x = arch.attend(block // 2, x, in_float32(weights), rope)
        x = arch.final_norm(x)
        head = arch.head_pieces() or ((0, rows) for rows in arch.head_weight.split(1024))
        return soft_cap(torch.cat([(x @ rows.float().T).cpu() for _, rows in head], -1), arch.cap)

    return model, TensorSource(tensor, logits, memory, arch.device)


def needs_files(loaded: LoadedModel) -> bool:
    """Whether a checkpoint is made of the model's files: where it was never whole, or what was computed in has not all the digits
    that the checkpoint has."""
    written = loaded.written or loaded.dtype
    return loaded.streamed or torch.promote_types(written, loaded.dtype) != loaded.dtype


def _as_written(prepared: Prepared) -> Prepared:
    """The same choices for the model in the type that its checkpoint has, streamed."""
    loaded = prepared.loaded
    if loaded.streamed and loaded.dtype == (loaded.written or loaded.dtype):
        return prepared
    prepared.engine.cache.clear()
    left = None if loaded.memory is None else max(loaded.memory - held_bytes(prepared.arch, loaded), 0)
    twin = as_written(loaded, left)
    arch = describe(twin.model)
    blocks: list[Prunable] = [replace(block, arch=arch) for block in prepared.engine.blocks]
    return replace(prepared, loaded=twin, arch=arch, engine=make_engine(arch, twin, blocks))


def _named(arch: Architecture, layer: int, weights: AttentionWeights | FfnWeights | None) -> dict[str, Tensor]:
    """A block's tensors under their checkpoint names."""
    if weights is None:
        return {}
    tensors = {}
    for place, parts in arch.layout.places(int(isinstance(weights, FfnWeights))).items():
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            parts_here = [tensor for part in parts if (tensor := getattr(weights, part + suffix)) is not None]
            if parts_here:
                name = f"{arch.layout.layer(layer)}.{place}.{kind}"
                tensors[name] = torch.cat(parts_here) if len(parts_here) > 1 else parts_here[0].contiguous()
    return tensors
