"""Tiny models prepared for pruning, and the same pruning done a second time by hooks on the transformers model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from selfpruner import compensation, criteria
from selfpruner.architectures import Architecture, describe
from selfpruner.architectures.cost import decoder_parameters, ffn_cost
from selfpruner.calibration.statistics import BlockStatistics, layer_statistics
from selfpruner.compensation import Compensation
from selfpruner.compensation.least_squares import FLOOR, RIDGE
from selfpruner.criteria import UnitCriterion
from selfpruner.evaluation.engine import Engine
from selfpruner.models.family_layouts import Widths, layout_of
from selfpruner.planning.space import Block, Plan, SearchSpace, attention_shapes, ffn_widths
from selfpruner.pruning.patterns import PrunableAttention, PrunableFfn, attention_block, ffn_block, measure_attention, measure_ffn
from tests.helpers.tiny_models import tiny_model

torch.set_num_threads(1)


def load_tiny(family: str, **options: Any) -> PreTrainedModel:
    """A random model of ``family``; options as for :func:`tests.helpers.tiny_models.tiny_model`."""
    with tempfile.TemporaryDirectory() as folder:
        source = tiny_model(Path(folder), family, **options)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    model.train(False)
    return model.requires_grad_(False)


def layers_of(model: Any) -> Any:
    """The decoder layers of a model, dense or pruned."""
    return model.get_submodule(layout_of(model.config).decoder).layers


def rows_of(model: Any, part: str) -> tuple[str, slice]:
    """The place of a part (``q``, ``down``) in a layer of a dense model, and its rows there."""
    layout = layout_of(model.config)
    widths, block = Widths.of(layout, model.config.to_dict()), int(part in layout.ffn)
    place = (layout.ffn if block else layout.attention)[part]
    start = 0
    for other in layout.places(block)[place]:
        if other == part:
            break
        start += widths.shape(other)[0]
    return place, slice(start, start + widths.shape(part)[0])


def outputs_of(model: Any, layer: int) -> tuple[Any, Any]:
    """The output matrices' modules of attention and FFN."""
    layout = layout_of(model.config)
    places = layout.attention["o"], layout.ffn["down"]
    return tuple(layers_of(model)[layer].get_submodule(place) for place in places)  # type: ignore[return-value]


def tokens_of(sequences: int, length: int, seed: int = 1, vocab: int = 128) -> Tensor:
    return torch.randint(4, vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))


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
    **engine: Any,
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
    how = criteria.create(criterion), compensation.create(method)
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


def random_plans(space: SearchSpace, count: int, seed: int = 0) -> list[Plan]:
    """Any legal plans, whatever they remove."""
    g = torch.Generator().manual_seed(seed)
    sizes = [len(block.options) for block in space.blocks]
    return [Plan(tuple(int(torch.randint(size, (1,), generator=g)) for size in sizes)) for _ in range(count)]


def inputs_of(model: PreTrainedModel, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per layer the inputs (sequences, length, n) of the output matrices, seen by hooks on the model's own modules."""
    seen: dict[tuple[int, int], Tensor] = {}
    handles = []
    for index in range(len(layers_of(model))):
        for which, module in enumerate(outputs_of(model, index)):

            def keep(_: Any, args: Any, place: tuple[int, int] = (index, which)) -> None:
                seen[place] = args[0].detach().double().view(*tokens.shape, -1)  # OPT's FFN sees all tokens in a row

            handles.append(module.register_forward_pre_hook(keep))
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(seen[index, 0], seen[index, 1]) for index in range(len(layers_of(model)))]


def kept_columns(case: Ready, plan: Plan, block: int) -> list[int]:
    """The columns of an output matrix that ``plan`` keeps, in the model's order."""
    prunable, level = case.blocks[block], plan.levels[block]
    if isinstance(prunable, PrunableFfn):
        return list(range(prunable.options[level].channels))  # the model's channels are in keep-first order
    heads = prunable.heads[level]
    return [head * case.arch.head_dim + i for head in heads for i in range(case.arch.head_dim)]


def repaired(W: Tensor, X: Tensor, kept: Sequence[int], method: str) -> tuple[Tensor, Tensor]:
    """A full-width output matrix with zeros where columns are gone, and its bias, solved from inputs X (tokens, n)."""
    gone = [j for j in range(W.shape[1]) if j not in set(kept)]
    mean = X.mean(0)
    new = torch.zeros_like(W)
    new[:, kept] = W[:, kept]
    if not gone or method == "none":
        return new, W.new_zeros(W.shape[0])
    if method == "least_squares_weights":
        mean = torch.zeros_like(mean)  # nothing takes it
    if method.startswith("least_squares"):
        centred = X - mean
        scatter = centred.pow(2).sum(0)
        ridge = (RIDGE * scatter + FLOOR * scatter.mean())[kept]
        A = centred[:, kept].T @ centred[:, kept] + torch.diag(ridge)
        target = centred[:, kept].T @ (centred @ W.T) + ridge[:, None] * W[:, kept].T
        new[:, kept] = torch.linalg.solve(A, target).T
    return new, (W - new) @ mean


def _replacing(W: Tensor, bias: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    def hook(_module: Any, args: Any, _out: Tensor) -> Tensor:
        return args[0] @ W.T + bias

    return hook


@contextmanager
def masked(case: Ready, plan: Plan) -> Iterator[PreTrainedModel]:
    """The dense model with pruned units silenced and repaired: full-width matrices, nothing of the engine or the patterns."""
    X = inputs_of(case.model, case.calibration)
    handles = []
    for index in range(case.arch.layers):
        for which, module in enumerate(outputs_of(case.model, index)):
            block = 2 * index + which
            if plan.levels[block] == 0:
                continue
            kept = kept_columns(case, plan, block)
            if kept:
                W, bias = repaired(module.weight.double(), X[index][which].flatten(0, 1), kept, case.compensation)
                bias = bias if module.bias is None else bias + module.bias
            else:
                W, bias = torch.zeros_like(module.weight), torch.zeros(module.out_features)
            handles.append(module.register_forward_hook(_replacing(W.float(), bias.float())))
    try:
        yield case.model
    finally:
        for handle in handles:
            handle.remove()


def naive(case: Ready, plan: Plan, tokens: Tensor) -> tuple[float, float]:
    """(KL, negative log-likelihood) per token from the full logits of the dense and the masked model."""
    dense = case.model(tokens, use_cache=False).logits.double().log_softmax(-1)
    with masked(case, plan) as model:
        out = model(tokens, use_cache=False, labels=tokens)
    pruned = out.logits.double().log_softmax(-1)
    return float((dense.exp() * (dense - pruned)).sum(-1).mean()), float(out.loss)
