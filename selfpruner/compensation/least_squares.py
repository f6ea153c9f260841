"""Nested least squares: the kept columns refitted to the dense output, at every level for the price of one factor.

With X centred on its mean m, C = X^T X - t m m^T + damping, and W (d, n), the weights and bias on the first k columns that are
nearest to the dense block's output on the calibration text are, for C = L L^T (columns in order of importance),

    W'_k = (W L)[:, :k] (L^-1)[:k, :k]        b'_k = b + W m - W'_k m_:k

because leading blocks of triangular factors nest: the normal equations of the first k columns are L_k L_k^T, and
W C_:,k = (W L)[:, :k] L_k^T. The squared error left is the tail energy of Y = W L, sum_{j >= k} ||Y_:j||^2 (plus the damping's
share). Centring is the same as keeping a constant input that is never removed, so the fit can never do worse than
FLAP's bias; the bias costs d numbers per block.

Source: architecture note "Nested least squares"; Hassibi & Stork 1993 and Frantar et al. 2022 (arXiv 2208.11580) for the step
that removes one group at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation.base import energy

# Ridge, as a share of the mean diagonal of C.
DAMPING = 1e-3


def covariance(stats: BlockStatistics, damping: float = DAMPING) -> Tensor:
    """C = X^T X - t m m^T + damping * mean(diag) * I, (n, n), in the statistics' dtype.

    An input that never moves has no covariance with anything; what rounding left there is cleared, so that only the damping
    stays: it costs next to nothing to remove and changes no other column.
    """
    C = stats.gram - stats.tokens * torch.outer(stats.mean, stats.mean)
    diagonal = C.diagonal()
    level = diagonal.clamp_min(0).mean()
    dead = diagonal <= 1e-10 * level if level > 0 else torch.ones_like(diagonal, dtype=torch.bool)
    C[dead, :] = 0
    C[:, dead] = 0
    diagonal += damping * level if level > 0 else 1.0
    return C


@dataclass(frozen=True, slots=True)
class NestedFit:
    """The factors of one block: ``Y`` = W L (d, n) and ``inverse`` = L^-1 (n, n), columns in keep-first order."""

    Y: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, W: Tensor, C: Tensor) -> NestedFit:
        """Factor C (n, n) and multiply. W and C have their columns in keep-first order already."""
        L = torch.linalg.cholesky(C)
        identity = torch.eye(L.shape[0], dtype=L.dtype, device=L.device)
        return cls(W @ L, torch.linalg.solve_triangular(L, identity, upper=False))

    def weights(self, k: int) -> Tensor:
        """W'_k (d, k)."""
        return self.Y[:, :k] @ self.inverse[:k, :k]

    def errors(self) -> Tensor:
        """(n + 1,): the squared error left when the first k columns are kept, k = 0..n."""
        energy = self.Y.pow(2).sum(0)
        tail = energy.flip(0).cumsum(0).flip(0)
        return torch.cat((tail, tail.new_zeros(1)))

    def to(self, dtype: torch.dtype) -> NestedFit:
        return NestedFit(self.Y.to(dtype), self.inverse.to(dtype))


def solve(W: Tensor, C: Tensor, kept: Tensor) -> Tensor:
    """The least-squares weights on the columns ``kept`` (k,), solved directly: W C_:,kept C_kept,kept^-1, (d, k)."""
    factor = torch.linalg.cholesky(C[kept][:, kept])
    return torch.cholesky_solve((W @ C[:, kept]).T, factor).T


@dataclass(frozen=True, slots=True)
class NestedLeastSquares:
    """``fit`` in float32 to halve what a layer keeps; ``mean`` (n,) in keep-first order and ``dense`` = W m (d,)."""

    fit: NestedFit
    mean: Tensor
    dense: Tensor
    left: Tensor

    def weights(self, k: int) -> tuple[Tensor, Tensor | None]:
        W = self.fit.weights(k)
        return W, self.dense - W @ self.mean[:k]

    def errors(self) -> Tensor:
        return self.left


@dataclass(frozen=True, slots=True)
class SubsetLeastSquares:
    """``C`` is kept in float32, which its damping makes precise enough, and solved in W's dtype."""

    W: Tensor
    C: Tensor
    mean: Tensor

    def weights(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        W = solve(self.W, self.C.to(self.W), kept)
        return W, self.W @ self.mean - W @ self.mean[kept]

    def error(self, kept: Tensor) -> float:
        C = self.C.to(self.W)
        W = solve(self.W, C, kept)
        return max(energy(self.W, C) - float(((W @ C[kept]) * self.W).sum()), 0.0)


class LeastSquares:
    """The kept weights and a bias refitted to the dense block's output on the dense block's inputs."""

    name: ClassVar[str] = "least_squares"
    source: ClassVar[str] = "normal equations; nested by Cholesky"
    adds_bias: ClassVar[bool] = True

    def nested(self, W: Tensor, stats: BlockStatistics, order: Tensor) -> NestedLeastSquares:
        C = covariance(stats).to(W)[order][:, order]
        fit = NestedFit.of(W[:, order], C)
        mean = stats.mean.to(W)[order]
        return NestedLeastSquares(fit.to(torch.float32), mean.float(), (W[:, order] @ mean).float(), fit.errors())

    def subset(self, W: Tensor, stats: BlockStatistics) -> SubsetLeastSquares:
        return SubsetLeastSquares(W, covariance(stats).float(), stats.mean.to(W))
