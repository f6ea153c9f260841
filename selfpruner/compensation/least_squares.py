"""Nested least squares: the kept columns refitted to the dense output, at every level for the price of one factor.

Let X be centred on its mean m, C = X^T X - t m m^T + D with a diagonal ridge D, and W (d, n). With C = L L^T, columns in order of
importance, the weights and bias on the first k columns that come nearest to the dense block's output on the calibration text are

    W'_k = (W L)[:, :k] (L^-1)[:k, :k]        b'_k = b + W m - W'_k m_:k

because leading blocks of triangular factors nest: the normal equations of the first k columns are L_k L_k^T, and
W C_:,k = (W L)[:, :k] L_k^T. The remaining squared error, including what the ridge charges for changing the kept weights, is the
tail energy of Y = W L, sum_{j >= k} ||Y_:j||^2, less sum_{j >= k} D_j ||W_:j||^2. Since W_:k = (W L) (L^-1)_:,:k, the same weights
are W less the contribution of the removed rows of L^-1,

    W'_k = W_:k - (W L)[:, k:] (L^-1)[k:, :k]

which is less work when few columns go. For a set R of removed columns that is not a suffix, with P = C^-1 and K the kept columns,

    W'_K = W_K - W_R P_RR^-1 P_RK        error = tr(W_R (P_RR^-1 - D_RR) W_R^T)

because P_RR^-1 is the variation of the removed inputs given the kept ones. Centring is the same as keeping a constant input that is
never removed, so the fit can never do worse than FLAP's bias; the bias costs d numbers per block.

D is a share of every input's own scatter: the fit is to inputs that each vary by that share more, independently. The share is
chosen per block on sequences that the fit has not seen (:func:`held_out_ridge`).

Without a bias the same holds for the moments about zero: C = X^T X + D, and m = 0.

Source: architecture note "Nested least squares"; Hassibi & Stork 1993 and Frantar et al. 2022 (arXiv 2208.11580) for the step
that removes one group at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation.base import STRIP, TYPICAL, energy, factored, inverted
from selfpruner.compensation.none import complement
from selfpruner.files.tensors import HeldParts, Parts

# What is added to the diagonal of C: a share of every input's own scatter and, so that an input which hardly moves has an inverse,
# a share of the mean one.
RIDGE, FLOOR = 0.1, 1e-4
# Shares to choose from, where sequences are kept aside to judge them.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Sums of rows of a matrix that stand for all of its rows when ridges are compared.
SKETCH = 128


def covariance(stats: BlockStatistics, ridge: float = RIDGE) -> Tensor:
    """C = X^T X - t m m^T with ``ridge`` and floor on its diagonal, (n, n), in the statistics' dtype."""
    return _damped(stats, ridge)[0]


def precision(stats: BlockStatistics, ridge: float = RIDGE) -> Tensor:
    """C^-1 for :func:`covariance`'s C, (n, n), float32.

    It is the correlation matrix that is inverted, in float32 and in place.
    """
    n, diagonal = len(stats.mean), stats.scatter.diagonal().to(stats.mean)
    level = diagonal.mean()
    dead = diagonal <= 1e-10 * level
    damped = diagonal.masked_fill(dead, 0.0) * (1 + ridge) + (FLOOR * level if level > 0 else 1.0)
    scale = damped.rsqrt()
    S = torch.empty(n, n, device=scale.device)
    for start in range(0, n, STRIP):
        rows = slice(start, start + STRIP)
        S[rows] = stats.scatter[rows].to(scale.dtype, copy=True).mul_(scale).mul_(scale[rows, None])
    S[dead, :] = 0
    S[:, dead] = 0
    S.diagonal().fill_(1.0)
    L = factored(S)
    torch.cholesky_inverse(L, out=L)
    scale = scale.float()
    return S.mul_(scale).mul_(scale[:, None])


def _damped(stats: BlockStatistics, ridge: float) -> tuple[Tensor, Tensor]:
    """The covariance, and what is on its diagonal beyond the inputs' scatter, (n,)."""
    C = stats.scatter.to(stats.mean.dtype, copy=True)
    damping = _damping(C, ridge)
    C.diagonal().add_(damping)
    return C, damping


def _damping(C: Tensor, ridge: float) -> Tensor:
    """What is added to the diagonal of C (n, n): (n,), above 0.

    An input that never moves has no covariance with anything; what rounding left there in C is cleared, so that only the floor
    stays: it costs next to nothing to remove and changes no other column.
    """
    damping, dead = _dampings(C.diagonal(), ridge)
    if dead.any():
        C[dead, :] = 0
        C[:, dead] = 0
    return damping


def _dampings(diagonal: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """What is added to a ``diagonal`` (n,), and which of its inputs never move."""
    level = diagonal.clamp_min(0).mean()
    return ridge * diagonal + (FLOOR * level if level > 0 else 1.0), diagonal <= 1e-10 * level


def _least_damped(damped: Callable[[float], Tensor], ridge: float) -> Tensor:
    """The Cholesky factor of ``damped`` with ``ridge``, or with the smallest larger one of RIDGES with which float32 has one."""
    larger = iter(share for share in RIDGES if share > ridge)
    while True:
        try:
            return factored(damped(ridge))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if (ridge := next(larger, 0.0)) == 0.0:
                raise


def held_out_ridge(W: Tensor, stats: BlockStatistics, kept: Tensor) -> float:
    """The ridge of RIDGES whose repair of W (d, n) on the columns ``kept``, fitted to the sequences that do not judge, is nearest
    to the dense block's output on those that do; RIDGE where none judges.

    The smallest ridge fits best what it sees, so the choice is made on what it has not seen.
    """
    if stats.judge is None:
        return RIDGE
    W, removed, judge = _sketched(W.float()), complement(kept, W.shape[1]), stats.judge
    fitted = stats.without_judge(removed, kept)
    shift = (judge.mean.to(fitted.mean) - fitted.mean).float()
    # What the sequences that do not judge have on the diagonal.
    between = judge.tokens * fitted.tokens / stats.tokens * shift.square()
    diagonal = stats.scatter.diagonal() - judge.scatter.diagonal() - between
    dead = _dampings(diagonal, RIDGE)[1]
    change = torch.zeros_like(W)
    change[:, removed] = -W[:, removed]
    pulled = torch.where(dead[removed], 0.0, W[:, removed]) @ fitted.scatter
    del fitted
    C = stats.without_judge(kept, kept).scatter
    if dead.any():
        pulled[:, dead[kept]] = 0
        C[dead[kept], :] = 0
        C[:, dead[kept]] = 0

    def judged(ridge: float) -> float:
        damped = C.clone()
        damped.diagonal().add_(_dampings(diagonal, ridge)[0][kept])
        factor, failed = damped.T, torch.empty((), dtype=torch.int32, device=damped.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))  # in its memory, see factored
        if failed:  # too small for float32
            return math.inf
        change[:, kept] = torch.cholesky_solve(pulled.T, factor).T
        return energy(change, judge.scatter) + judge.tokens * float((change @ shift).square().sum())

    place = RIDGES.index(RIDGE)
    best = judged(RIDGE)
    for step in (-1, 1):  # downhill: there is one valley
        start = place
        while 0 <= place + step < len(RIDGES) and (found := judged(RIDGES[place + step])) < best:
            place, best = place + step, found
        if place != start:
            break
    return RIDGES[place]


def _sketched(W: Tensor) -> Tensor:
    """W (d, n), or of a tall W few sums of its rows with random signs: as a repair is linear in W, the squared errors of two
    repairs compare there as they do on all rows."""
    if len(W) <= 2 * SKETCH:
        return W
    signs = torch.randint(2, (SKETCH, len(W)), generator=torch.Generator().manual_seed(0)).to(W) * 2 - 1
    return signs @ W


@dataclass(frozen=True, slots=True)
class NestedFit:
    """The factors of one block: ``Y`` = W L (d, n) and ``inverse`` = L^-1 (n, n), columns in keep-first order."""

    Y: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, W: Tensor, C: Tensor) -> NestedFit:
        """Factor C (n, n) and multiply. W and C have their columns in keep-first order already."""
        return cls.of_factor(W, torch.linalg.cholesky(C))

    @classmethod
    def of_factor(cls, W: Tensor, L: Tensor) -> NestedFit:
        """From L (n, n) with C = L L^T, whose memory the inverse takes."""
        Y = torch.empty_like(W)
        for start in range(0, len(L), STRIP):  # above the diagonal are zeros
            columns = slice(start, start + STRIP)
            torch.matmul(W[:, start:], L[start:, columns], out=Y[:, columns])
        return cls(Y, inverted(L))

    def errors(self) -> Tensor:
        """(n + 1,): the squared error left when the first k columns are kept, k = 0..n."""
        energy = self.Y.square().sum(0, dtype=None if self.Y.device.type == "mps" else torch.float64)
        tail = energy.flip(0).cumsum(0).flip(0)
        return torch.cat((tail, tail.new_zeros(1)))


@dataclass(frozen=True, slots=True)
class NestedLeastSquares:
    """Parts: ``Yt`` (n, d), the transposed Y; ``inverse.0``, ``inverse.1``, ... the rows of L^-1 in order, ``_strip(n)`` at a
    time and only up to the diagonal; ``mean`` (n,) in keep-first order: all float32, to halve what a layer keeps.
    ``left`` (n + 1,), the errors. Without ``biased`` the mean is zero."""

    parts: Parts
    biased: bool = True

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
        return repaired, whole @ mean - repaired @ mean[:k] if self.biased else None

    def errors(self) -> Tensor:
        return self.parts["left"]


def _strip(n: int) -> int:
    """Rows of L^-1 kept as one part: few enough that the zeros right of the diagonal, which are left out, are nearly half."""
    return max(64, -(-n // 16))


@dataclass(frozen=True, slots=True)
class SubsetLeastSquares:
    """Parts: ``P`` = C^-1 (n, n) in float32, which the damping makes precise enough, ``mean`` (n,) in float64 where the device
    has it, and ``damping`` (n,), what the ridge added to the diagonal of C; solved in the precision of the mean. Without ``biased``
    the mean is zero."""

    parts: Parts
    biased: bool = True

    def weights(self, kept: Tensor, W: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = self.parts["mean"]
        dense = W.to(mean)
        P = self.parts["P"].to(mean)
        removed = complement(kept, len(mean))
        repaired = dense[:, kept] - self._spread(dense, P, removed) @ P[removed][:, kept]
        return repaired.float(), (dense @ mean - repaired @ mean[kept]).float() if self.biased else None

    def error(self, kept: Tensor, W: Tensor) -> float:
        mean = self.parts["mean"]
        dense, P = W.to(mean), self.parts["P"].to(mean)
        removed = complement(kept, len(mean))
        gone = dense[:, removed]
        own = (gone.square().sum(0) * self.parts["damping"].to(mean)[removed]).sum()
        return max(float((self._spread(dense, P, removed) * gone).sum() - own), 0.0)

    @staticmethod
    def _spread(W: Tensor, P: Tensor, removed: Tensor) -> Tensor:
        """W_R P_RR^-1, (d, removed)."""
        return torch.cholesky_solve(W[:, removed].T, torch.linalg.cholesky(P[removed][:, removed])).T


class LeastSquares:
    """The kept weights and a bias refitted to the dense block's output on the dense block's inputs."""

    name: ClassVar[str] = "least_squares"
    source: ClassVar[str] = "normal equations; nested by Cholesky"
    adds_bias: ClassVar[bool] = True
    refits: ClassVar[bool] = True

    def nested(self, W: Tensor, stats: BlockStatistics, order: Tensor) -> NestedLeastSquares:
        stats = self._moments(stats)
        n, mean = len(order), stats.mean[order]
        ridge = held_out_ridge(W, stats, order[: max(1, round(TYPICAL * n))])
        W = W[:, order].float()
        C = W.new_empty(n, n)  # the inverse takes its place
        damping = W.new_empty(n)

        def damped(ridge: float) -> Tensor:
            for start in range(0, n, STRIP):  # in the order, strip by strip
                C[start : start + STRIP] = stats.scatter[order[start : start + STRIP]].index_select(1, order)
            damping.copy_(_damping(C, ridge))
            C.diagonal().add_(damping)
            return C

        fit = NestedFit.of_factor(W, _least_damped(damped, ridge))
        # The ridge's charge for the removed columns themselves is not an error.
        own = (W.square().sum(0) * damping).to(mean).flip(0).cumsum(0).flip(0)
        left = (fit.errors() - torch.cat((own, own.new_zeros(1)))).clamp_min(0)
        parts = HeldParts(Yt=fit.Y.T.contiguous(), mean=mean.float(), left=left)
        rows = _strip(n)
        for index, start in enumerate(range(0, n, rows)):
            stop = min(start + rows, n)
            parts[f"inverse.{index}"] = fit.inverse[start:stop, :stop].contiguous()
        return self.nested_of(parts)

    def subset(self, W: Tensor, stats: BlockStatistics, kept: Tensor) -> SubsetLeastSquares:
        stats = self._moments(stats)
        C, damping = _damped(stats, held_out_ridge(W, stats, kept))
        L = factored(C)
        P = torch.cholesky_inverse(L, out=L)
        return self.subset_of(HeldParts(P=P.float(), mean=stats.mean.to(P), damping=damping.float()))

    def nested_of(self, parts: Parts) -> NestedLeastSquares:
        return NestedLeastSquares(parts, self.adds_bias)

    def subset_of(self, parts: Parts) -> SubsetLeastSquares:
        return SubsetLeastSquares(parts, self.adds_bias)

    def _moments(self, stats: BlockStatistics) -> BlockStatistics:
        """What the weights are fitted to: the inputs about their mean, because a bias takes the mean."""
        return stats


class LeastSquaresWeights(LeastSquares):
    """The kept weights alone refitted, for families and runtimes that have no place for a bias: the inputs about zero."""

    name: ClassVar[str] = "least_squares_weights"
    source: ClassVar[str] = "normal equations; nested by Cholesky; no bias"
    adds_bias: ClassVar[bool] = False

    def _moments(self, stats: BlockStatistics) -> BlockStatistics:
        judge = stats.judge
        if judge is not None:
            raw = torch.addr(judge.scatter, judge.mean, judge.mean, alpha=judge.tokens)
            judge = replace(judge, mean=torch.zeros_like(judge.mean), scatter=raw)
        mean = stats.mean.float()
        scatter = torch.addr(stats.scatter, mean, mean, alpha=stats.tokens)
        return replace(stats, mean=torch.zeros_like(stats.mean), scatter=scatter, judge=judge)
