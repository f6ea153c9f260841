"""Factors on disk: one safetensors file per layer, written once per model, calibration text, criterion and compensation.

Whoever needs a level reads its part of the file, so no worker holds factors. A worker that replaces another one, or the next job,
is ready as soon as it has read the orders. A file is written aside and renamed, so what exists is whole.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from selfpruner.architectures import Architecture
from selfpruner.compensation import Compensation
from selfpruner.criteria import Criterion
from selfpruner.files import atomic
from selfpruner.files.tensors import HeldParts, StoredParts, TensorFile, held_shapes, write_tensors
from selfpruner.pruning.patterns.units import AttentionFactors, FfnFactors
from selfpruner.pruning.signals import LayerFacts

# Raise it when a criterion, a compensation or the layout changes what is in the files.
_FORMAT = 4


def factor_files(
    arch: Architecture, folder: Path, fingerprint: str, criterion: Criterion, compensation: Compensation
) -> list[Path]:
    """The file of every layer under ``folder``; ``fingerprint`` identifies model and calibration text."""
    asked = f"{_FORMAT}:{fingerprint}:{arch.dtype}:{criterion.name}:{compensation.name}"
    stored_in = folder / hashlib.sha256(asked.encode()).hexdigest()[:24]
    return [stored_in / f"layer-{layer:04d}.safetensors" for layer in range(arch.layers)]


def write_factors(file: Path, attention: AttentionFactors, ffn: FfnFactors, facts: LayerFacts) -> None:
    """Write one layer's factors, and ``facts`` (JSON) with them. Raises DiskFullError, and leaves nothing then."""
    tensors = {"order": ffn.order.int(), "errors": ffn.errors}
    for name, repair in (("attention.", attention.repair), ("ffn.", ffn.repair)):
        assert isinstance(repair.parts, HeldParts)
        tensors |= {name + part: tensor for part, tensor in repair.parts.items()}
    shapes = [[*shape, list(heads), attention.errors[shape]] for shape, heads in attention.heads.items()]
    metadata = {"attention": json.dumps(shapes), "facts": json.dumps(dict(facts))}
    with atomic.replacing(file) as aside:
        write_tensors(aside, held_shapes(tensors), tensors.__getitem__, metadata)


def read_factors(file: Path, compensation: Compensation, device: torch.device) -> tuple[AttentionFactors, FfnFactors, LayerFacts]:
    """One layer's factors, their repairs still in the file, and the facts."""
    opened = TensorFile(file)
    shapes = json.loads(opened.metadata["attention"])
    attention = AttentionFactors(
        {(groups, per_group): heads for groups, per_group, heads, _ in shapes},
        {(groups, per_group): error for groups, per_group, _, error in shapes},
        compensation.subset_of(StoredParts(opened, "attention.", device)),
    )
    repair = compensation.nested_of(StoredParts(opened, "ffn.", device))
    ffn = FfnFactors(opened.read("order").long(), opened.read("errors"), repair)
    return attention, ffn, json.loads(opened.metadata["facts"])
