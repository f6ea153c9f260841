"""What the closed-form allocations of other papers need to know about a model: plain numbers, measured layer by layer.

Outliers and thresholds come from the calibration statistics of the matrices that are scored, so they cost a few element-wise
products per layer and no pass over the text. Spectra take an eigenvalue problem per matrix, so they are computed only on request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TypedDict

import torch
from torch import Tensor

from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights
from selfpruner.architectures.order import checkpoint_ffn
from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.criteria.base import Evidence, Heads, Matrix
from selfpruner.criteria.flap import Flap
from selfpruner.criteria.masks import Sparsity
from selfpruner.errors import CancelledTaskError
from selfpruner.files import atomic
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Option

# OWL calls a weight an outlier when |W_ij| * ||X_j|| is above M times the layer's mean.
OUTLIER_M = 5.0


class LayerFacts(TypedDict):
    outlier_ratio: float
    head_scores: list[float]
    channel_scores: list[float]


class LayerSignals(TypedDict, total=False):
    """Nothing where only one plan is asked for. ``flap_thresholds``: those of the attention and of the FFN."""

    outlier_ratio: float
    flap_thresholds: list[list[float]]


def layer_facts(arch: Architecture, layer: int, statistics: tuple[BlockStatistics, BlockStatistics]) -> LayerFacts:
    """What the signals of one layer are made of, whatever its levels; ``statistics`` are those of (attention, ffn)."""
    W = [matrix.float() for matrix in (arch.attention(layer).o, checkpoint_ffn(arch, layer).down)]
    outputs = [Matrix(name, w, stats) for name, w, stats in zip(("o", "down"), W, statistics, strict=True)]
    heads = Heads(arch.kv_groups, arch.heads_per_group, arch.head_dim)
    return {
        "outlier_ratio": outlier_ratio(outputs),
        "head_scores": head_scores(W[0], statistics[0], heads).tolist(),
        "channel_scores": channel_scores(W[1], statistics[1]).tolist(),
    }


def layer_signals(facts: LayerFacts, options: tuple[Sequence[Option], Sequence[Option]]) -> LayerSignals:
    """The signals of one layer from its facts; ``options`` are those of (attention, ffn).

    ``outlier_ratio``: share of outliers among the weights (OWL, arXiv 2310.05175). ``flap_thresholds``: for attention and FFN, per
    level, the global threshold on FLAP's standardised scores at which the block falls to that level (arXiv 2312.11983, AL-AM).
    """
    return {
        "outlier_ratio": facts["outlier_ratio"],
        "flap_thresholds": [
            level_thresholds(torch.tensor(facts["head_scores"]), [option.heads for option in options[0]]),
            level_thresholds(torch.tensor(facts["channel_scores"]), [option.channels for option in options[1]]),
        ],
    }


def weight_facts(matrices: Mapping[str, Matrix], levels: Sequence[Sparsity]) -> LayerSignals:
    """The signals of one layer for patterns that make weights zero, in the form of :func:`layer_signals`.

    OWL's outliers are counted in all matrices, as published. FLAP's threshold has no form for single weights; taken here is its
    metric of a weight, var(X_j) W_ij^2, standardised over the block.
    """
    thresholds = []
    for ffn in (False, True):
        names = [name for name in matrices if (name in ("gate", "up", "down")) == ffn]
        scores = torch.empty(sum(matrices[name].W.numel() for name in names))
        start = 0
        for name in names:
            importances = _varying(matrices[name]).flatten()
            scores[start : start + len(importances)] = importances
            start += len(importances)
            del importances
        mean, deviation = float(scores.mean()), max(float(scores.std()), 1e-12)
        ordered = scores.numpy()
        ordered.sort()  # in place: torch's sort also makes the places, eight bytes each
        places = [min(int(level.share * len(ordered)), len(ordered)) - 1 for level in levels]
        standard = ((float(ordered[max(index, 0)]) - mean) / deviation - (index < 0) for index in places)
        thresholds.append([round(value, 6) for value in accumulate(standard, max)])
    return {"outlier_ratio": outlier_ratio(matrices.values()), "flap_thresholds": thresholds}


def _varying(matrix: Matrix) -> Tensor:
    assert matrix.inputs is not None
    return matrix.W.square().mul_(matrix.inputs.variance.to(matrix.W))


def gather(layers: Sequence[LayerSignals]) -> Signals:
    """The signals of a model: ``outlier_ratio`` one number per layer, ``flap_thresholds`` one list per block in plan order."""
    return {
        "outlier_ratio": [layer["outlier_ratio"] for layer in layers],
        "flap_thresholds": [thresholds for layer in layers for thresholds in layer["flap_thresholds"]],
    }


def spectral_exponents(arch: Architecture, file: Path, cancelled: Callable[[], bool] = lambda: False) -> list[float]:
    """Per layer the mean exponent of its matrices' spectra (AlphaPruning, arXiv 2410.10912), kept in ``file``: they depend on
    nothing but the weights. Raises CancelledTaskError between layers."""
    if file.exists():
        exponents: list[float] = json.loads(file.read_text("utf-8"))
        return exponents
    exponents = []
    for layer in range(arch.layers):
        if cancelled():
            raise CancelledTaskError("Cancelled while looking at spectra.")
        blocks: tuple[AttentionWeights | FfnWeights, ...] = (arch.attention(layer), checkpoint_ffn(arch, layer))
        matrices = [getattr(weights, name) for weights in blocks for name in weights.matrices]
        exponents.append(round(fmean(hill_exponent(W) for W in matrices), 6))
    atomic.write_text(file, json.dumps(exponents))
    return exponents


def hill_exponent(W: Tensor) -> float:
    """The exponent of the power law that the large eigenvalues of W^T W follow, by Hill's estimator:

        1 + k / sum_(i <= k) ln(l_i / l_(k+1))        for the eigenvalues l_1 >= l_2 >= ...

    over the k that lie above the peak of their logarithms' histogram. Smaller: a heavier tail.
    """
    W = W.to(torch.float32 if W.device.type == "mps" else torch.float64)
    small = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    values = torch.linalg.eigvalsh(small).flip(0)
    logs = values[values > values[0] * 1e-12].log().cpu()
    if len(logs) < 3 or float(logs[0] - logs[-1]) < 1e-9:
        return 1.0  # no spectrum to speak of
    counts, edges = torch.histogram(logs.float(), bins=100)
    above = int((logs.float() >= edges[int(counts.argmax())]).sum())
    k = min(max(above - 1, 2), len(logs) - 1)
    return 1.0 + k / max(float((logs[:k] - logs[k]).sum()), 1e-9)


def outlier_ratio(matrices: Collection[Matrix], m: float = OUTLIER_M) -> float:
    """Share of |W_ij| * ||X_j|| above ``m`` times their mean, over ``matrices`` together, which are gone through twice."""
    sums = [(matrix.W.numel(), (matrix.W.abs() * matrix.norm).sum()) for matrix in matrices]
    count = sum(numel for numel, _ in sums)
    total = torch.stack([part for _, part in sums]).sum()
    outliers = [(matrix.W.abs() * matrix.norm > m * total / count).sum() for matrix in matrices]
    return float(torch.stack(outliers).sum()) / count


def channel_scores(W: Tensor, stats: BlockStatistics) -> Tensor:
    """FLAP's channel scores (n,), standardised over the block."""
    return _standard(Flap().score_columns(Evidence(W, stats, {})))


def head_scores(W: Tensor, stats: BlockStatistics, heads: Heads) -> Tensor:
    """FLAP's query-head scores (H,): squared column scores, standardised over the block, averaged over the head's columns."""
    return _standard(Flap().score_columns(Evidence(W, stats, {})).pow(2)).view(-1, heads.head_dim).mean(-1)


def level_thresholds(scores: Tensor, kept: Sequence[int]) -> list[float]:
    """Per level, the highest score among the units it removes when it keeps the ``kept[level]`` best, so the block is at the last
    level whose threshold the global one has reached. Never falling; level 0 stands at the lowest score (it removes nothing)."""
    falling = scores.sort(descending=True).values.tolist()
    lowest = falling[-1]
    return [round(value, 6) for value in accumulate((falling[k] if k < len(falling) else lowest - 1.0 for k in kept), max)]


def _standard(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std().clamp_min(1e-12)
