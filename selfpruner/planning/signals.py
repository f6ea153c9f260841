"""What the closed-form allocations know about the dense model; :mod:`selfpruner.pruning.signals` measures it. Imports no torch."""

from __future__ import annotations

from typing_extensions import TypedDict


class Signals(TypedDict, total=False):
    """``outlier_ratio`` and ``spectral_exponents``: one number per layer. ``flap_thresholds``: one list per block, in plan order,
    with one threshold per level. What was not asked for is not there."""

    outlier_ratio: list[float]
    spectral_exponents: list[float]
    flap_thresholds: list[list[float]]
