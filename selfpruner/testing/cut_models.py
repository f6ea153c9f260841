"""Tiny models with random units cut out, and the same cut made by hooks on the dense model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

import selfpruner.testing.tiny_models as tiny
from selfpruner.export.build import shapes_of
from selfpruner.export.checkpoint import LayerShape, build
from selfpruner.files.card_info import CardInfo
from selfpruner.models.family_layouts import Widths, layout_of
from selfpruner.pruning.layer_shapes import KeptUnits
from selfpruner.testing.device import DEVICE
from selfpruner.testing.tiny_models import outputs_of, rows_of

CARD = CardInfo(
    base_model="example/tiny",
    rate=0.3,
    criterion="obs",
    compensation="least_squares",
    calibration=("self",),
    plan_hash="0123456789abcdef",
    levels=(0, 1, 2),
    layer_rates=(0.1, 0.2, 0.3),
    metrics={"dense": {"perplexity": 29.6}, "pruned": {"perplexity": 37.4, "kl": 0.26}},
    terms={"license": "apache-2.0"},
)


@dataclass(frozen=True)
class Keep:
    """Which units a layer keeps; None: the whole block is dropped."""

    heads: tuple[int, ...] | None
    channels: tuple[int, ...] | None


@dataclass(frozen=True)
class Case:
    """A dense model, its pruned twin, and what was kept."""

    dense: PreTrainedModel
    pruned: Any
    keeps: list[Keep]
    biases: dict[str, Tensor]


def folder(path: Path, family: str, **options: Any) -> tuple[Path, PreTrainedModel]:
    source = tiny.tiny_model(path, family, **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    return source, model.eval().to(DEVICE)


def cut(model: PreTrainedModel, layer: int, keep: Keep, groups: list[int]) -> dict[str, Tensor]:
    """The tensors of a layer that keeps these units."""
    layout, dense = layout_of(model.config), model.state_dict()
    size = Widths.of(layout, model.config.to_dict()).head_dim

    def spread(units: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor([unit * size + i for unit in units for i in range(size)])

    found = {}
    for block, kept in enumerate((keep.heads, keep.channels)):
        if kept is None:
            continue
        units = torch.tensor(kept) if block else spread(kept)
        for place, parts in layout.places(block).items():
            for kind in ("weight", "bias"):
                name = f"{layout.layer(layer)}.{place}.{kind}"
                if name not in dense or (parts[0] in ("o", "down") and kind == "bias"):
                    continue
                pieces = []
                for part in parts:
                    whole = dense[name][rows_of(model, part)[1]]
                    left = spread(groups) if part in ("k", "v") else units
                    pieces.append(whole[:, left] if part in ("o", "down") else whole[left])
                found[name] = torch.cat(pieces)
    return found


def prune(model: PreTrainedModel, *, drop: bool, biased: bool, seed: int = 0, group_step: int = 1) -> Case:
    """Cut random units, different in every layer, out of ``model``: each has ``group_step`` KV groups less than the one before."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of(model.config)
    widths = Widths.of(layout, model.config.to_dict())
    per_group = widths.heads // widths.kv_heads
    layers = model.config.num_hidden_layers
    shapes: list[LayerShape] = []
    keeps: list[Keep] = []
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for layer in range(layers):
        left = max(group_step, widths.kv_heads - layer * group_step)
        groups = sorted(rng.sample(range(widths.kv_heads), left))
        inside = max(1, per_group - (layer + 1) % 2)
        heads = tuple(h for g in groups for h in sorted(rng.sample(range(g * per_group, (g + 1) * per_group), inside)))
        channels = tuple(sorted(rng.sample(range(widths.channels), widths.channels - 8 * (layer + 1))))
        keep = Keep(None if drop and layer == 0 else heads, None if drop and layer == layers - 1 else channels)
        keeps.append(keep)
        shapes.append(LayerShape(*((len(groups), inside) if keep.heads else (0, 0)), len(keep.channels or ())))
        weights |= cut(model, layer, keep, groups)
        # Biases in some layers only: the first and the last have none on o, the first none on down.
        for part, wanted in (("o", keep.heads and 0 < layer < layers - 1), ("down", keep.channels and layer)):
            if biased and wanted:
                name = f"{layout.layer(layer)}.{rows_of(model, part)[0]}.bias"
                biases[name] = torch.randn(widths.hidden, generator=generator)
                weights[name] = biases[name] + model.state_dict().get(name, 0)
    pruned = build(model, shapes, weights)
    assert shapes_of(pruned.config) == shapes
    return Case(model, pruned, keeps, biases)


def units_of(case: Case) -> KeptUnits:
    """What units.json says of a case."""
    widths = Widths.of(layout_of(case.dense.config), case.dense.config.to_dict())
    base = LayerShape(widths.kv_heads, widths.heads // widths.kv_heads, widths.channels)
    return KeptUnits(base, [(list(keep.heads or ()), list(keep.channels or ())) for keep in case.keeps])


@contextmanager
def masked_dense(case: Case) -> Iterator[None]:
    """The dense model with removed units silenced by hooks on its own modules: nothing of the exporter is used."""
    handles = []
    for index, keep in enumerate(case.keeps):
        attention, ffn = outputs_of(case.dense, index)
        size = Widths.of(layout_of(case.dense.config), case.dense.config.to_dict()).head_dim
        wide = torch.zeros(attention.in_features)
        for head in keep.heads or ():
            wide[head * size : (head + 1) * size] = 1
        narrow = torch.zeros(ffn.in_features)
        narrow[list(keep.channels or ())] = 1
        for module, mask, part, kept in ((attention, wide, "o", keep.heads), (ffn, narrow, "down", keep.channels)):
            name = f"{layout_of(case.dense.config).layer(index)}.{rows_of(case.dense, part)[0]}.bias"
            shift = case.biases.get(name, torch.zeros(()))
            if kept is None and module.bias is not None:
                shift = -module.bias  # a dropped block takes its bias with it
            handles.append(module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
            handles.append(module.register_forward_hook(lambda _, __, out, shift=shift: out + shift))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
