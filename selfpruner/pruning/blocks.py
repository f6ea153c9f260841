"""Every block of a model at every level: statistics, gradients, orders and repairs are made once and then read from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfpruner.architectures import Architecture
from selfpruner.calibration.texts import TokenBatches
from selfpruner.config import SearchConfig
from selfpruner.models import LoadedModel
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Plan
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.pruning import patterns
from selfpruner.pruning.measurements import Measurements
from selfpruner.pruning.patterns import Prunable

# Sequences of a part of the text; on fewer, adding up a layer's moments outweighs making them.
LEAST_SEQUENCES = 8


def prepare_blocks(
    config: SearchConfig,
    arch: Architecture,
    loaded: LoadedModel,
    calibration: TokenBatches,
    cache: Path,
    progress: OnProgress,
    cancelled: Cancelled,
    plan: Plan | None = None,
) -> tuple[list[Prunable], Signals]:
    """Every block at every level, in plan order, for the config's criterion and compensation; and the model's signals.

    Orders and repairs are made once and then read from ``cache``; the model's channels are put in the criterion's order.
    """
    measured = measurements(arch, loaded, calibration, cache, progress, cancelled)
    return patterns.create(config, arch).blocks(measured, plan)


def measurements(
    arch: Architecture,
    loaded: LoadedModel,
    calibration: TokenBatches,
    cache: Path,
    progress: OnProgress,
    cancelled: Cancelled,
) -> Measurements:
    fingerprint = f"{loaded.source.fingerprint}:{calibration.fingerprint}"
    sources = ", ".join(share.source for share in calibration.sources)
    return Measurements(arch, loaded, calibration.tokens, cache, fingerprint, sources, progress, cancelled)


def shares(config: SearchConfig, measured: Measurements, workers: int) -> tuple[int, tuple[int, ...]]:
    """Into how many parts the statistics can be cut for ``workers``, 0 where they are there; and the layers that wait for them,
    none where one worker has to do it all. Says what it will take."""
    pattern = patterns.create(config, measured.arch)
    layers = tuple(pattern.unmade(measured))
    if not layers or "gradients" in pattern.criterion.needs:
        return 0, ()
    missing = measured.missing(pattern.sites)
    parts = min(workers, len(measured.tokens) // LEAST_SEQUENCES) if missing else 0
    if missing and parts < 2:
        return 0, ()
    pattern.announce(measured)
    return parts, layers


def collect_part(config: SearchConfig, measured: Measurements, part: int, parts: int) -> int:
    """Statistics of one of ``parts`` of the text, for :func:`make_layers`; how many tokens that were."""
    return measured.collect_part(patterns.create(config, measured.arch).sites, part, parts)


def make_layers(config: SearchConfig, measured: Measurements, layers: Sequence[int], parts: int) -> None:
    """Make what levels of ``layers`` are cut from, in the cache."""
    pattern = patterns.create(config, measured.arch)
    unmade = pattern.unmade(measured)
    for layer in [layer for layer in layers if layer in unmade]:
        pattern.make(measured, layer, measured.statistics_of(layer, pattern.sites, parts), None)
        measured.progress(f"units of layer {layer + 1}/{measured.arch.layers} ordered by {pattern.criterion.name}")
