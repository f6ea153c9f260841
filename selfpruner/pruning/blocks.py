"""Every block of a model at every level: statistics, gradients, orders and repairs are made once and then read from the cache."""

from __future__ import annotations

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
    fingerprint = f"{loaded.source.fingerprint}:{calibration.fingerprint}"
    sources = ", ".join(share.source for share in calibration.sources)
    measured = Measurements(arch, loaded, calibration.tokens, cache, fingerprint, sources, progress, cancelled)
    return patterns.create(config, arch).blocks(measured, plan)
