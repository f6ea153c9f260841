"""What preparing a model will take, said before it begins.

Memory and disk follow from the model's shapes. Most of the time goes into the statistics, and a piece of them is timed: a few
sequences through the first layer, here and now. The time of orders and repairs is estimated from one small factorisation and from
measurements on two shapes (SmolLM2-135M and Qwen2.5-0.5B). So the time is a range, and still a guess.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from selfpruner.architectures import Architecture
from selfpruner.architectures.cost import attention_cost, ffn_cost
from selfpruner.calibration.cache import strip_rows
from selfpruner.calibration.statistics import JUDGES, OUTPUTS, TOKENS_PER_STEP, Site, layer_statistics
from selfpruner.files.cache_folder import size
from selfpruner.progress import Foreseen

# Factorisations of a layer's width that ordering and repairing it is worth, and how that grows with the width.
_PROBE, _REFERENCE, _GROWTH = 768, 1536, 2.2
_ORDER, _REPAIR, _OTHER = 9, 5, 3
_LOW, _HIGH = 0.6, 1.8


@dataclass(frozen=True, slots=True)
class Outlook:
    """``seconds`` beside ``unknown``, what nobody can foresee; ``memory`` beyond the libraries' and ``disk``, in bytes."""

    seconds: float
    unknown: tuple[str, ...]
    memory: int
    disk: int

    def told(self, folder: Path) -> Foreseen:
        more = f" and what its {' and '.join(self.unknown)} take" if self.unknown else ""
        return Foreseen(
            f"a first preparation takes {_span(_LOW * self.seconds, _HIGH * self.seconds)}{more} (a guess, by a piece of it), "
            f"{size(self.memory)} of memory and {size(self.disk)} of disk in {folder} (see: selfpruner cache)"
        )


def statistics_bytes(arch: Architecture, sites: Collection[Site], sequences: int) -> int:
    """What the statistics of all layers take on disk."""
    total = 0
    for site, width in _widths(arch).items():
        if site in sites:
            matrices = 2 if site in OUTPUTS and sequences >= JUDGES else 1
            total += matrices * (2 * width * (width + strip_rows(width)) + 32 * width)
    return arch.layers * total


def gradient_bytes(arch: Architecture) -> int:
    """What three sums of every weight's gradients take on disk, in bfloat16."""
    return arch.layers * 6 * (attention_cost(arch, arch.kv_groups, arch.heads_per_group) + ffn_cost(arch, arch.channels))


def factor_bytes(arch: Architecture, *, refitted: bool) -> int:
    """What orders and repairs of all layers take on disk; ``refitted`` weights keep an inverse of the channels' moments."""
    heads, n = arch.heads * arch.head_dim, arch.channels
    own = 4 * (n * arch.hidden + n * (n + max(64, n // 16)) // 2) if refitted else 0
    return arch.layers * (4 * heads**2 + own + 64 * n)


def probe_statistics(arch: Architecture, tokens: Tensor, sites: Collection[Site], memory: int | None) -> float:
    """Seconds that the statistics of all of ``tokens`` (sequences, length) will take in all layers, by those of a few in one."""
    few = tokens[: max(1, min(TOKENS_PER_STEP // tokens.shape[1], len(tokens) // 16))]
    started = time.perf_counter()
    next(iter(layer_statistics(arch, few, sites, memory=memory)))
    _wait(arch.device)
    return (time.perf_counter() - started) * len(tokens) / len(few) * arch.layers


def probe_order(arch: Architecture, device: torch.device, *, searched: bool, refitted: bool) -> float:
    """Seconds that ordering (``searched``: by removing one unit after the other) and repairing all layers' units will take."""
    seconds = _factorisation(device) * (_REFERENCE / _PROBE) ** 3
    times = (_ORDER if searched else 0) + (_REPAIR if refitted else _OTHER)
    width = max(arch.channels, arch.heads * arch.head_dim)
    return float(arch.layers * seconds * times * (width / _REFERENCE) ** _GROWTH)


@cache
def _factorisation(device: torch.device) -> float:
    """Seconds of one small factorisation."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    matrix = torch.eye(_PROBE, dtype=dtype, device=device) + 1.0 / _PROBE
    times = []
    for _ in range(3):  # the first one also loads what it needs
        started = time.perf_counter()
        torch.linalg.cholesky(matrix)
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _widths(arch: Architecture) -> dict[Site, int]:
    return {
        "qkv": arch.hidden,
        "attention": arch.heads * arch.head_dim,
        "gate_up": arch.hidden,
        "ffn": arch.channels,
    }


def _span(low: float, high: float) -> str:
    if high < 90:
        return f"about {max(low, 1):.0f} to {max(high, 2):.0f} seconds"
    if high < 5400:
        return f"about {max(low / 60, 1):.0f} to {high / 60:.0f} minutes"
    return f"about {low / 3600:.1f} to {high / 3600:.1f} hours"
