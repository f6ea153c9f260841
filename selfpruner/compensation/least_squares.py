"""Nested least squares: the kept columns refitted to the dense output, at every level for the price of one factor.

With X centred on its mean m, C = X^T X - t m m^T + damping, and W (d, n), the weights and bias on the first k columns that are
nearest to the dense block's output on the calibration text are, for C = L L^T (columns in order of importance),

    W'_k = (W L)[:, :k] (L^-1)[:k, :k]        b'_k = b + W m - W'_k m_:k

because leading blocks of triangular factors nest: the normal equations of the first k columns are L_k L_k^T, and
W C_:,k = (W L)[:, :k] L_k^T. The squared error left is the tail energy of Y = W L, sum_{j >= k} ||Y_:j||^2 (plus the damping's
share). With W_:k = (W L) (L^-1)_:,:k the same weights are W less what the removed rows of L^-1 brought,

    W'_k = W_:k - (W L)[:, k:] (L^-1)[k:, :k]

which is less work where few columns go. For a set R of removed columns that is no suffix, with P = C^-1 and K the kept ones,

    W'_K = W_K - W_R P_RR^-1 P_RK        error = tr(W_R P_RR^-1 W_R^T)

as P_RR^-1 is what the removed inputs vary by when the kept ones are known. Centring is the same as keeping a constant input that
is never removed, so the fit can never do worse than FLAP's bias; the bias costs d numbers per block.

Source: architecture note "Nested least squares"; Hassibi & Stork 1993 and Frantar et al. 2022 (arXiv 2208.11580) for the step
that removes one group at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation.none import complement
from selfpruner.tensor_files import HeldParts, Parts

# Ridge, as a share of the mean diagonal of C.
DAMPING = 1e-3


def covariance(stats: BlockStatistics, damping: float = DAMPING) -> Tensor:
    """C = X^T X - t m m^T + damping * mean(diag) * I, (n, n), in the statistics' dtype.

    An input that never moves has no covariance with anything; what rounding left there is cleared, so that only the damping
    stays: it costs next to nothing to remove and changes no other column.
    """
    C = torch.addr(stats.gram, stats.mean, stats.mean, alpha=-stats.tokens)
    diagonal = C.diagonal()
    level = diagonal.clamp_min(0).mean()
    dead = diagonal <= 1e-10 * level if level > 0 else torch.ones_like(diagonal, dtype=torch.bool)
    if dead.any():
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
        torch.linalg.solve_triangular(L, identity, upper=False, out=identity)
        return cls(W @ L, identity)

    def errors(self) -> Tensor:
        """(n + 1,): the squared error left when the first k columns are kept, k = 0..n."""
        energy = self.Y.pow(2).sum(0)
        tail = energy.flip(0).cumsum(0).flip(0)
        return torch.cat((tail, tail.new_zeros(1)))


@dataclass(frozen=True, slots=True)
class NestedLeastSquares:
    """Parts: ``Yt`` (n, d), the transposed Y; ``inverse.0``, ``inverse.1``, ... the rows of L^-1 in order, ``_strip(n)`` at a
    time and only up to the diagonal; ``mean`` (n,) in keep-first order: all float32, to halve what a layer keeps.
    ``left`` (n + 1,), the errors."""

    parts: Parts

    def weights(self, k: int, W: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = self.parts["mean"]
        n, rows = mean.numel(), _strip(mean.numel())
        whole = W.float()
        few = 3 * k > 2 * n  # removed: d (n - k) k multiplications against d k^2 / 2 ... d k^2
        repaired = whole[:, :k].clone() if few else whole.new_zeros(len(W), k)
        for index in range(k // rows if few else 0, -(-(n if few else k) // rows)):
            first = index * rows
            start, stop = max(first, k if few else 0), min(first + rows, n if few else k)
            if start == stop:
                continue
            inverse = self.parts.rows(f"inverse.{index}", start - first, stop - first)[:, : min(k, stop)]
            repaired[:, : inverse.shape[1]].addmm_(self.parts.rows("Yt", start, stop).T, inverse, alpha=-1 if few else 1)
        return repaired, whole @ mean - repaired @ mean[:k]

    def errors(self) -> Tensor:
        return self.parts["left"]


def _strip(n: int) -> int:
    """Rows of L^-1 kept as one part: few enough that the zeros right of the diagonal, which are left out, are nearly half."""
    return max(64, -(-n // 16))


@dataclass(frozen=True, slots=True)
class SubsetLeastSquares:
    """Parts: ``P`` = C^-1 (n, n) in float32, which the damping makes precise enough, ``mean`` (n,) in float64 where the device
    has it; solved in the precision of the mean."""

    parts: Parts

    def weights(self, kept: Tensor, W: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = self.parts["mean"]
        dense = W.to(mean)
        P = self.parts["P"].to(mean)
        removed = complement(kept, len(mean))
        repaired = dense[:, kept] - self._spread(dense, P, removed) @ P[removed][:, kept]
        return repaired.float(), (dense @ mean - repaired @ mean[kept]).float()

    def error(self, kept: Tensor, W: Tensor) -> float:
        mean = self.parts["mean"]
        dense, P = W.to(mean), self.parts["P"].to(mean)
        removed = complement(kept, len(mean))
        return max(float((self._spread(dense, P, removed) * dense[:, removed]).sum()), 0.0)

    @staticmethod
    def _spread(W: Tensor, P: Tensor, removed: Tensor) -> Tensor:
        """W_R P_RR^-1, (d, removed)."""
        return torch.cholesky_solve(W[:, removed].T, torch.linalg.cholesky(P[removed][:, removed])).T


class LeastSquares:
    """The kept weights and a bias refitted to the dense block's output on the dense block's inputs."""

    name: ClassVar[str] = "least_squares"
    source: ClassVar[str] = "normal equations; nested by Cholesky"
    adds_bias: ClassVar[bool] = True

    def nested(self, W: Tensor, stats: BlockStatistics, order: Tensor) -> NestedLeastSquares:
        W = W[:, order]
        fit = NestedFit.of(W, covariance(stats).to(W)[order][:, order])
        mean = stats.mean.to(W)[order]
        parts = HeldParts(Yt=fit.Y.T.float().contiguous(), mean=mean.float(), left=fit.errors())
        n, rows = mean.numel(), _strip(mean.numel())
        for index, start in enumerate(range(0, n, rows)):
            stop = min(start + rows, n)
            parts[f"inverse.{index}"] = fit.inverse[start:stop, :stop].float().contiguous()
        return NestedLeastSquares(parts)

    def subset(self, stats: BlockStatistics) -> SubsetLeastSquares:
        P = torch.cholesky_inverse(torch.linalg.cholesky(covariance(stats)))
        return SubsetLeastSquares(HeldParts(P=P.float(), mean=stats.mean.to(P)))

    def nested_of(self, parts: Parts) -> NestedLeastSquares:
        return NestedLeastSquares(parts)

    def subset_of(self, parts: Parts) -> SubsetLeastSquares:
        return SubsetLeastSquares(parts)
