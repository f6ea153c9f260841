"""Statistics on disk: one safetensors file per layer, shared by all jobs on one model and text.

A layer's file is written aside and renamed, so what exists is whole; a job that dies half-way goes on from the layers that are
there only if all are, since a layer's inputs need the walk through the layers before it. Of a Gram matrix the scatter about the
mean is kept, in float32: rounding then is relative to what the inputs vary, not to where they lie. What is computed and what
is read back are the same numbers, so a resumed job makes the same plans.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfpruner.architectures import Architecture
from selfpruner.calibration.statistics import BlockStatistics, layer_statistics
from selfpruner.errors import disk_errors
from selfpruner.workers.memory import release

_FIELDS = ("mean", "variance", "energy")
_FORMAT = 2


def cached_statistics(
    arch: Architecture,
    tokens: Tensor,
    folder: Path,
    fingerprint: str,
    *,
    memory: int | None = None,
    on: torch.device | None = None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[BlockStatistics, BlockStatistics]]:
    """Per-layer (attention, ffn) statistics, read from ``folder`` where they are complete, else collected and written.

    ``fingerprint`` identifies model, text and everything else the numbers depend on; the dtype is added here. ``memory`` bounds
    collecting, see :func:`layer_statistics`; ``on`` is where the statistics go, by default the model's device.
    """
    on = on or arch.device
    key = hashlib.sha256(f"{_FORMAT}:{fingerprint}:{arch.dtype}".encode()).hexdigest()[:24]
    place = folder / key
    files = [place / f"layer-{layer:04d}.safetensors" for layer in range(arch.layers)]
    if all(file.exists() for file in files):
        for layer, file in enumerate(files):
            progress(f"reading statistics of layer {layer + 1}/{arch.layers}")
            yield _read(file, on)
        return
    place.mkdir(parents=True, exist_ok=True)
    collected = layer_statistics(arch, tokens, memory=memory, scratch=place, progress=progress, cancelled=cancelled)
    for file in files:
        _write(file, next(collected))
        release()
        yield _read(file, on)


def _write(file: Path, pair: tuple[BlockStatistics, BlockStatistics]) -> None:
    tensors = {}
    for name, stats in zip(("attention", "ffn"), pair, strict=True):
        for part in _FIELDS:
            value: Tensor = getattr(stats, part)
            tensors[f"{name}.{part}"] = value.cpu().contiguous()
        scatter = stats.gram.addr_(stats.mean, stats.mean, alpha=-stats.tokens)  # in place: nobody else has these statistics
        tensors[f"{name}.scatter"] = scatter.float().cpu().contiguous()
    counts = {"tokens": str(pair[0].tokens), "sequences": str(pair[0].sequences)}
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with disk_errors(file):
            save_file(tensors, aside, metadata=counts)
            aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _read(file: Path, device: torch.device) -> tuple[BlockStatistics, BlockStatistics]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        counts = opened.metadata()
    tensors = load_file(file)
    dtype = torch.float32 if device.type == "mps" else torch.float64

    def block(name: str) -> BlockStatistics:
        mean, variance, energy, scatter = (tensors[f"{name}.{part}"].to(device, dtype) for part in (*_FIELDS, "scatter"))
        tokens = int(counts["tokens"])
        gram = scatter.addr_(mean, mean, alpha=tokens)
        return BlockStatistics(tokens, int(counts["sequences"]), mean, variance, energy, gram)

    return block("attention"), block("ffn")
