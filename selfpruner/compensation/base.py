"""The contract of a compensation: how the kept columns of a block's output matrix change, and the error that remains.

W (d, n) is the block's output matrix and X (tokens, n) its inputs on the calibration text. Errors are squared errors of the
block's output, ||X W^T - (X_kept W'^T + b)||_F^2, summed over tokens and outputs, as the statistics give them. A repair does not
hold W, because the model does: whoever asks for W' passes W in, in the model's dtype.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.files.tensors import Parts

# Rows of a moment that are looked at together.
STRIP = 128
# The share of a block's columns that is kept where a repair has to settle something for all levels.
TYPICAL = 0.7


class NestedRepair(Protocol):
    """For blocks whose levels are prefixes of one order (FFN). W's columns are in keep-first order.

    A repair is made of ``parts``, named tensors: in memory when it was just computed, in a file afterwards.
    """

    @property
    def parts(self) -> Parts: ...

    def weights(self, k: int, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """(W' (d, k), bias to add (d,) or None), both float32, when the first k columns of W (d, n) stay."""
        ...

    def errors(self) -> Tensor:
        """(n + 1,): squared error left at every k, from k = 0 to n."""
        ...


class SubsetRepair(Protocol):
    """For blocks whose options are arbitrary sets of columns (attention). Made of ``parts``, as a nested repair is."""

    @property
    def parts(self) -> Parts: ...

    def weights(self, kept: Tensor, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """(W' (d, k), bias to add (d,) or None) when the columns ``kept`` (k,), ascending, of W (d, n) stay."""
        ...

    def error(self, kept: Tensor, W: Tensor) -> float: ...


class Compensation(Protocol):
    """``adds_bias``: whether a pruned block gets an output bias, which counts in its parameters. ``refits``: whether kept weights
    change."""

    name: ClassVar[str]
    source: ClassVar[str]
    adds_bias: ClassVar[bool]
    refits: ClassVar[bool]

    def nested(self, W: Tensor, stats: BlockStatistics, order: Tensor) -> NestedRepair:
        """W (d, n) in the model's order; ``order`` (n,) is keep-first."""
        ...

    def subset(self, W: Tensor, stats: BlockStatistics, kept: Tensor) -> SubsetRepair:
        """W (d, n); ``kept`` is a set of columns as it is likely to be asked for."""
        ...

    def nested_of(self, parts: Parts) -> NestedRepair:
        """The nested repair whose parts these are."""
        ...

    def subset_of(self, parts: Parts) -> SubsetRepair: ...


def energy(W: Tensor, moment: Tensor) -> float:
    """tr(W moment W^T): the squared size of W's (d, n) output for a symmetric second moment (n, n) of its inputs. Strip by strip,
    in W's dtype, and each pair of inputs once."""
    total = 0.0
    for start in range(0, W.shape[1], STRIP):
        stop = min(start + STRIP, W.shape[1])
        own = W[:, start:stop]
        total += float(((own @ moment[start:stop, start:stop].to(W.dtype)) * own).sum(dtype=torch.float64))
        if stop < W.shape[1]:
            total += 2 * float(((W[:, stop:] @ moment[start:stop, stop:].T.to(W.dtype)) * own).sum(dtype=torch.float64))
    return total


def output_energy(W: Tensor, stats: BlockStatistics) -> float:
    """||X W^T||_F^2, the squared size of the output that W (d, n) makes of the inputs."""
    return max(energy(W.float(), stats.scatter), 0.0) + stats.tokens * float((W @ stats.mean.to(W)).square().sum())


def factored(C: Tensor) -> Tensor:
    """The lower Cholesky factor of the symmetric C (n, n), in C's memory. Raises torch.linalg.LinAlgError.

    A symmetric matrix is its own transpose, and LAPACK wants columns: passed this way, no second matrix of its size is made.
    """
    L = C.T
    torch.linalg.cholesky(L, out=L)
    return L


def inverted(L: Tensor) -> Tensor:
    """The inverse of the lower triangular L (n, n), in L's memory: by halves, so that most of it is solving for many columns."""
    n = len(L)
    if n <= STRIP:
        L.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False))
        return L
    half = (n // 2 + STRIP - 1) // STRIP * STRIP
    below = torch.linalg.solve_triangular(L[half:, half:], L[half:, :half], upper=False)
    L[half:, :half] = torch.linalg.solve_triangular(L[:half, :half], below, upper=False, left=False).neg_()
    inverted(L[:half, :half])
    inverted(L[half:, half:])
    return L


def suffix_energies(W: Tensor, scatter: Tensor, order: Tensor, mean: Tensor | None = None, tokens: int = 0) -> Tensor:
    """(n + 1,): tr(W_R scatter_RR W_R^T) for R = the columns of W (d, n) from place k of ``order`` (n,) on, for every k at once.

    With ``mean`` (n,) of the second moment that is not taken about it: scatter + tokens * mean mean^T. Strip by strip, in W's
    dtype, so that no second matrix of the scatter's size exists.
    """
    n = len(order)
    ordered, own = W[:, order], W.new_zeros(n + 1)
    for start in range(0, n, STRIP):
        stop = min(start + STRIP, n)
        part = scatter[order[start:stop]][:, order[start:]].to(W.dtype)
        if mean is not None:
            part.addr_(mean[order[start:stop]], mean[order[start:]], alpha=tokens)
        # Column k with itself, and twice with those after it.
        part *= ordered[:, start:stop].T @ ordered[:, start:]
        own[start:stop] = 2 * part.triu(1).sum(1) + part.diagonal()
    return own.flip(0).cumsum(0).flip(0).clamp_min(0)
