"""One block without a model: an output matrix, its inputs, and their statistics."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.statistics import Accumulator, BlockStatistics
from selfpruner.criteria import Heads, Matrix


@dataclass(frozen=True)
class Sample:
    """W (d, n) float64; X (sequences, length, n) float32; ``stats`` of X."""

    W: Tensor
    X: Tensor
    stats: BlockStatistics
    coupled: dict[str, Matrix] = field(default_factory=dict)

    @property
    def rows(self) -> Tensor:
        return self.X.flatten(0, 1).double()


def sample(
    n: int, d: int = 12, *, seed: int = 0, tokens: int | None = None, kind: str = "correlated", sequences: int = 4
) -> Sample:
    """Random inputs: ``white``, ``correlated`` (mixed at random, uneven scales), ``low_rank``, ``offset`` (large means)."""
    g = torch.Generator().manual_seed(seed)
    length = (tokens or 8 * n) // sequences
    X = torch.randn(sequences, length, n, generator=g)
    if kind in ("correlated", "offset"):
        X = (
            X
            @ (torch.randn(n, n, generator=g) / n**0.5 + 0.5 * torch.eye(n))
            * torch.logspace(-1, 1, n)[torch.randperm(n, generator=g)]
        )
        X = X + torch.randn(n, generator=g) * (30.0 if kind == "offset" else 1.0)
    elif kind == "low_rank":
        rank = max(n // 4, 1)
        X = torch.randn(sequences, length, rank, generator=g) @ torch.randn(rank, n, generator=g) + 0.05 * X
    W = torch.randn(d, n, generator=g).double()
    return Sample(W, X, statistics_of(X))


def with_gradients(block: Sample, heads: Heads | None = None, seed: int = 0, *, gated: bool = True) -> Sample:
    """The block with all its matrices and their gradients: an attention of these ``heads``, or an FFN."""
    d, n = block.W.shape
    widths = {"gate": n, "up": n, "down": n} if gated else {"up": n, "down": n}
    if heads is not None:
        widths = {"q": n, "k": heads.kv_groups * heads.head_dim, "v": heads.kv_groups * heads.head_dim, "o": n}
    g = torch.Generator().manual_seed(seed)
    coupled = {}
    for name, width in widths.items():
        own = name in ("o", "down")
        W = block.W.float() if own else torch.randn(width, d, generator=g)
        coupled[name] = Matrix(name, W, block.stats if own else None, gradients_of(torch.randn(5, *W.shape, generator=g)))
    return replace(block, coupled=coupled)


def gradients_of(samples: Tensor) -> Gradients:
    """The sums of gradients (sequences, out, in)."""
    return Gradients(samples.sum(0), samples.abs().sum(0), samples.pow(2).sum(0), len(samples))


def statistics_of(X: Tensor) -> BlockStatistics:
    accumulator = Accumulator(X.shape[-1], X.device)
    for part in X.split(2):
        accumulator.add(part)
    return accumulator.finish()


def output_error(block: Sample, W: Tensor, kept: Tensor, bias: Tensor | None) -> float:
    """||X W_dense^T - (X_kept W^T + b)||_F^2, from X directly."""
    out = block.rows[:, kept] @ W.double().T
    if bias is not None:
        out = out + bias.double()
    return float((block.rows @ block.W.T - out).pow(2).sum())


def matrix(out: int = 24, width: int = 32, seed: int = 0, kind: str = "correlated") -> Matrix:
    block = sample(width, out, seed=seed, kind=kind)
    g = torch.Generator().manual_seed(seed + 100)
    return Matrix("up", block.W.float(), block.stats, gradients_of(torch.randn(5, out, width, generator=g)))
