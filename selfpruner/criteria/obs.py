"""Optimal Brain Surgeon on whole units: remove the unit whose loss least squares can repair best, again and again.

With the kept weights always at their least-squares optimum and P = C^-1 over the inputs still kept, removing the set S costs
exactly tr(W_S (P_SS)^-1 W_S^T) of squared block error, and the optimum moves by

    W <- W - W_S (P_SS)^-1 P_S,:          P <- P - P_:,S (P_SS)^-1 P_S,:

For a channel the cost is ||W_j||^2 / P_jj. Source: Hassibi & Stork 1993; Kurtic et al. 2023 (ZipLM, arXiv 2302.04089).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation.least_squares import covariance
from selfpruner.criteria.base import Heads

# Channels removed between two downdates of the large matrices: a 64th of them, within these bounds; three times as many
# candidates for them are followed exactly.
BATCH = (4, 64)


class Obs:
    """Greedy elimination by least-squares residual."""

    name: ClassVar[str] = "obs"
    source: ClassVar[str] = "Hassibi & Stork 1993; Kurtic et al. 2023, arXiv 2302.04089"

    def order_channels(self, W: Tensor, stats: BlockStatistics) -> Tensor:
        return eliminate_channels(W, covariance(stats).to(W))

    def choose_heads(self, W: Tensor, stats: BlockStatistics, heads: Heads) -> dict[tuple[int, int], list[int]]:
        """Whole groups go first, one by one; from every number of groups left, heads go one by one, equally many per group."""
        state = _State.start(W, covariance(stats).to(W))
        r, h = heads.heads_per_group, heads.head_dim
        groups = {g: list(range(g * r, (g + 1) * r)) for g in range(heads.kv_groups)}
        chosen: dict[tuple[int, int], list[int]] = {}
        while groups:
            self._thin(state, groups, heads, chosen)
            if len(groups) == 1:
                break
            _, group = min((state.cost([c for head in members for c in _columns(head, h)]), g) for g, members in groups.items())
            state = state.without([c for head in groups.pop(group) for c in _columns(head, h)])
        return chosen

    @staticmethod
    def _thin(state: _State, groups: dict[int, list[int]], heads: Heads, chosen: dict[tuple[int, int], list[int]]) -> None:
        left = {g: list(members) for g, members in groups.items()}
        h = heads.head_dim
        chosen[len(left), heads.heads_per_group] = sorted(head for members in left.values() for head in members)
        for per_group in range(heads.heads_per_group - 1, 0, -1):
            while crowded := [g for g, members in left.items() if len(members) > per_group]:
                _, group, head = min((state.cost(_columns(head, h)), g, head) for g in crowded for head in left[g])
                state = state.without(_columns(head, h))
                left[group].remove(head)
            chosen[len(left), per_group] = sorted(head for members in left.values() for head in members)


class _State:
    """W and P over the columns still there; ``position`` maps an original column to its place, -1 when gone."""

    def __init__(self, W: Tensor, P: Tensor, position: Tensor) -> None:
        self.W, self.P, self.position = W, P, position

    @classmethod
    def start(cls, W: Tensor, C: Tensor) -> _State:
        inverse = _inverse_factor(C)
        return cls(W.clone(), inverse.T @ inverse, torch.arange(W.shape[1]))

    def cost(self, columns: list[int]) -> float:
        s = self.position[columns]
        factor = torch.linalg.cholesky(self.P[s][:, s])
        return float(torch.linalg.solve_triangular(factor, self.W[:, s].T, upper=False).pow(2).sum())

    def without(self, columns: list[int]) -> _State:
        s = self.position[columns]
        keep = torch.ones(self.W.shape[1], dtype=torch.bool)
        keep[s] = False
        W, P = _downdate(self.W, self.P, s, keep.to(self.W.device))
        position = self.position.clone()
        position[columns] = -1
        alive = position >= 0
        position[alive] = torch.argsort(torch.argsort(position[alive]))
        return _State(W, P, position)


def eliminate_channels(W: Tensor, C: Tensor) -> Tensor:
    """Keep-first order (n,) of single columns for weights W (d, n) and covariance C (n, n).

    Inside a pool of the cheapest candidates the elimination is exact, one column at a time; the large matrices follow every
    ``batch`` removals, so the work is matrix products instead of n rank-one updates. While costs do not fall as others
    leave, which the pool's margin covers, the order is the exact greedy one.
    """
    inverse = _inverse_factor(C).float()
    P = inverse.T @ inverse
    W = W.float()
    batch = min(max(W.shape[1] // 64, BATCH[0]), BATCH[1])
    names = torch.arange(W.shape[1], device=W.device)
    gone = torch.zeros_like(names, dtype=torch.bool)
    removed: list[Tensor] = []
    left = names.numel()
    while left:
        cost = (W.pow(2).sum(0) / P.diagonal()).masked_fill_(gone, torch.inf)
        pool = torch.topk(cost, min(3 * batch, left), largest=False).indices
        W_pool, P_pool = W[:, pool], P[pool][:, pool]
        picks = _greedy(W_pool.T @ W_pool, P_pool, min(batch, left))
        out = pool[picks]
        removed.append(names[out])
        gone[out] = True
        left -= out.numel()
        factor = torch.linalg.cholesky(P_pool[picks][:, picks])
        rows = torch.cholesky_solve(P[out], factor)  # (P_SS)^-1 P_S,:
        W = W.addmm_(W[:, out], rows, alpha=-1) if removed[:-1] else torch.addmm(W, W[:, out], rows, alpha=-1)
        P.addmm_(P[:, out], rows, alpha=-1)
        P.diagonal()[out] = 1.0  # zero up to rounding now, and never looked at again
        if left < 0.8 * names.numel():
            alive = (~gone).nonzero().flatten()
            names, W, P = names[alive], W[:, alive], P[alive][:, alive]
            gone = torch.zeros_like(names, dtype=torch.bool)
    return torch.cat(removed).flip(0)


def _greedy(inner: Tensor, P: Tensor, count: int) -> Tensor:
    """Exact greedy removal of ``count`` of the pool's columns. ``inner`` = W^T W over the pool (p, p), which is all the costs need.

    The weights' update W <- W - W_j P_j,: / P_jj moves inner products by rank-two terms of the same small size.
    """
    device = P.device
    A, Q = inner.cpu().clone(), P.cpu().clone()
    gone = torch.zeros(A.shape[0], dtype=torch.bool)
    picks = []
    for _ in range(count):
        cost = (A.diagonal() / Q.diagonal()).masked_fill(gone, torch.inf)
        j = int(cost.argmin())
        picks.append(j)
        gone[j] = True
        pivot = Q[j, j]
        u = Q[j] / pivot
        a = A[j].clone()
        A -= torch.outer(u, a) + torch.outer(a, u) - a[j] * torch.outer(u, u)
        Q -= torch.outer(Q[:, j].clone(), u)
        # The removed row and column are zero now up to rounding; a harmless pivot keeps the diagonal positive.
        Q[j, j] = 1.0
    return torch.tensor(picks, device=device)


def _inverse_factor(C: Tensor) -> Tensor:
    """L^-1 for C = L L^T, so that C^-1 = L^-T L^-1."""
    L = torch.linalg.cholesky(C)
    identity = torch.eye(L.shape[0], dtype=L.dtype, device=L.device)
    inverse: Tensor = torch.linalg.solve_triangular(L, identity, upper=False)
    return inverse


def _downdate(W: Tensor, P: Tensor, gone: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    factor = torch.linalg.cholesky(P[gone][:, gone])
    rows = torch.cholesky_solve(P[gone][:, keep], factor)  # (P_SS)^-1 P_S,:
    return W[:, keep] - W[:, gone] @ rows, P[keep][:, keep] - P[keep][:, gone] @ rows


def _columns(head: int, width: int) -> list[int]:
    return list(range(head * width, (head + 1) * width))
