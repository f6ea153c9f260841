"""Optimal Brain Surgeon on whole units: remove the unit whose loss least squares can repair best, again and again.

Keep the remaining weights at their least-squares optimum and let P = C^-1 over the inputs still kept. Removing the set S then costs
exactly tr(W_S (P_SS)^-1 W_S^T) of squared block error, and the optimum moves by

    W <- W - W_S (P_SS)^-1 P_S,:          P <- P - P_:,S (P_SS)^-1 P_S,:

For a channel the cost is ||W_j||^2 / P_jj. Source: Hassibi & Stork 1993; Kurtic et al. 2023 (ZipLM, arXiv 2302.04089).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from selfpruner.catalogue import CRITERIA
from selfpruner.compensation.base import STRIP
from selfpruner.compensation.least_squares import precision
from selfpruner.criteria.base import Heads, Need, UnitBlock

# Channels removed between two downdates of the large matrices: a 64th of them, within these bounds; three times as many
# candidates for them are followed exactly.
BATCH = (4, 64)

_Groups = dict[int, list[int]]  # the query heads left in each KV group left


class Obs:
    """Greedy elimination by least-squares residual."""

    name: ClassVar[str] = "obs"
    patterns: ClassVar[tuple[str, ...]] = CRITERIA[name].patterns
    source: ClassVar[str] = "Hassibi & Stork 1993; Kurtic et al. 2023, arXiv 2302.04089"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations", "second_order"})

    def order_channels(self, block: UnitBlock) -> Tensor:
        return eliminate_channels(block.W, precision(block.stats))

    def choose_heads(self, block: UnitBlock, heads: Heads) -> dict[tuple[int, int], list[int]]:
        """Both ways to every option, the cheaper one counts: whole groups first, one by one, and then heads inside those left;
        or heads first, one by one, equally many per group, and then what is left of whole groups."""
        dense = _State(block.W.clone(), precision(block.stats).to(block.W), torch.arange(block.W.shape[1]))
        r = heads.heads_per_group
        whole = {group: list(range(group * r, (group + 1) * r)) for group in range(heads.kv_groups)}
        best: dict[tuple[int, int], tuple[float, list[int]]] = {}

        def offer(state: _State, groups: _Groups) -> None:
            option = len(groups), len(next(iter(groups.values())))
            kept = sorted(head for members in groups.values() for head in members)
            best[option] = min(best.get(option, (float("inf"), [])), (state.spent, kept))

        for state, groups in _fewer_heads(dense, whole, heads.head_dim):
            for fewer, left in _fewer_groups(state, groups, heads.head_dim):
                offer(fewer, left)
        # With all groups there, thinning out was just done.
        for state, groups in islice(_fewer_groups(dense, whole, heads.head_dim), 1, None):
            for fewer, left in _fewer_heads(state, groups, heads.head_dim):
                offer(fewer, left)
        return {option: kept for option, (_, kept) in best.items()}


class _State:
    """W and P over the columns still there; ``position`` maps an original column to its place, -1 when gone; ``spent`` is the
    squared error of what was removed so far."""

    def __init__(self, W: Tensor, P: Tensor, position: Tensor, spent: float = 0.0) -> None:
        self.W, self.P, self.position, self.spent = W, P, position, spent

    def cost(self, columns: list[int]) -> float:
        s = self.position[columns]
        factor = torch.linalg.cholesky(self.P[s][:, s])
        return float(torch.linalg.solve_triangular(factor, self.W[:, s].T, upper=False).pow(2).sum())

    def without(self, columns: list[int]) -> _State:
        s = self.position[columns]
        spent = self.spent + self.cost(columns)
        keep = torch.ones(self.W.shape[1], dtype=torch.bool)
        keep[s] = False
        W, P = _downdate(self.W, self.P, s, keep.to(self.W.device))
        position = self.position.clone()
        position[columns] = -1
        alive = position >= 0
        position[alive] = torch.argsort(torch.argsort(position[alive]))
        return _State(W, P, position, spent)


def _fewer_groups(state: _State, groups: _Groups, width: int) -> Iterator[tuple[_State, _Groups]]:
    """The state with all ``groups``, and after each removal of the cheapest group, down to one."""
    yield state, groups
    while len(groups) > 1:
        _, gone = min((state.cost(_columns(members, width)), group) for group, members in groups.items())
        state = state.without(_columns(groups[gone], width))
        groups = {group: members for group, members in groups.items() if group != gone}
        yield state, groups


def _fewer_heads(state: _State, groups: _Groups, width: int) -> Iterator[tuple[_State, _Groups]]:
    """The state with all heads, and each time every group has lost one more, down to one: the cheapest head goes first."""
    yield state, groups
    left = {group: list(members) for group, members in groups.items()}
    for count in range(len(next(iter(groups.values()))) - 1, 0, -1):
        while crowded := [group for group, members in left.items() if len(members) > count]:
            _, group, head = min((state.cost(_columns([head], width)), group, head) for group in crowded for head in left[group])
            state = state.without(_columns([head], width))
            left[group].remove(head)
        yield state, {group: list(members) for group, members in left.items()}


def eliminate_channels(W: Tensor, P: Tensor) -> Tensor:
    """Keep-first order (n,) of single columns for weights W (d, n) and P = C^-1 (n, n), float32, which is used up.

    Inside a pool of the cheapest candidates the elimination is exact, one column at a time; the large matrices follow every
    ``batch`` removals, so the work is matrix products instead of n rank-one updates, and of P only what is on the diagonal and
    right of it follows. While costs do not fall as others leave, which the pool's margin covers, the order is the exact greedy one.
    """
    rows = W.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # of one column of W each
    n = len(rows)
    batch = min(max(n // 64, BATCH[0]), BATCH[1])
    names = torch.arange(n, device=W.device)
    gone = torch.zeros_like(names, dtype=torch.bool)
    removed: list[Tensor] = []
    left = n
    while True:
        cost = torch.linalg.vector_norm(rows, dim=1).square_().div_(P.diagonal()).masked_fill_(gone, torch.inf)
        pool = torch.topk(cost, min(3 * batch, left), largest=False).indices
        W_pool = rows[pool]
        P_pool = P[torch.minimum(pool[:, None], pool), torch.maximum(pool[:, None], pool)]
        picks = _greedy(W_pool @ W_pool.T, P_pool, min(batch, left))
        out = pool[picks]
        removed.append(names[out])
        left -= out.numel()
        if not left:
            return torch.cat(removed).flip(0)
        # With P_SS = F F^T: what is taken from P is V^T V for V = F^-1 P_S,:.
        factor = torch.linalg.cholesky(P_pool[picks][:, picks])
        places = torch.arange(len(P), device=P.device)
        V = torch.linalg.solve_triangular(factor, torch.where(places >= out[:, None], P[out], P[:, out].T), upper=False)
        rows.addmm_(V.T, torch.linalg.solve_triangular(factor, W_pool[picks], upper=False), alpha=-1)
        for start in range(0, len(P), STRIP):
            P[start : start + STRIP, start:].addmm_(V[:, start : start + STRIP].T, V[:, start:], alpha=-1)
        P.diagonal()[out] = 1.0  # zero up to rounding now, and never looked at again
        gone[out] = True
        if left < 0.8 * len(names):
            alive = (~gone).nonzero().flatten()
            for start in range(0, left, STRIP):  # in place: every row that moves up is read before it is overwritten
                ahead = alive[start : start + STRIP]
                P[start : start + len(ahead), start:left] = P[ahead].index_select(1, alive[start:])
            names, rows, P = names[alive], rows[alive], P[:left, :left]
            gone = torch.zeros_like(names, dtype=torch.bool)


def _greedy(inner: Tensor, P: Tensor, count: int) -> Tensor:
    """Exact greedy removal of ``count`` of the pool's columns. ``inner`` = W^T W over the pool (p, p), which is all the costs need.

    With u = P_j,: / P_jj, removing j takes P_jj u u^T from P and u b^T + b u^T from the inner products, b being their row j less
    half its entry j times u. Of both matrices only the diagonals follow; a row is brought up to date when it is its turn.
    """
    A, Q = inner.cpu().numpy(), P.cpu().numpy()
    a, q = A.diagonal().copy(), Q.diagonal().copy()
    U, B, V = (np.empty((count, len(A)), A.dtype) for _ in range(3))
    picks: list[int] = []
    for done in range(count):
        j = int((a / q).argmin())
        picks.append(j)
        row = Q[j] - V[:done, j] @ V[:done]
        np.divide(row, row[j], out=U[done])
        np.divide(row, np.sqrt(row[j]), out=V[done])
        own = A[j] - U[:done, j] @ B[:done] - B[:done, j] @ U[:done]
        np.subtract(own, 0.5 * own[j] * U[done], out=B[done])
        a -= 2 * U[done] * B[done]
        q -= V[done] ** 2
        a[j], q[j] = np.inf, 1.0
    return torch.tensor(picks, device=P.device)


def _downdate(W: Tensor, P: Tensor, gone: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    factor = torch.linalg.cholesky(P[gone][:, gone])
    rows = torch.cholesky_solve(P[gone][:, keep], factor)  # (P_SS)^-1 P_S,:
    fewer = P[keep]
    others, fewer = fewer[:, gone], fewer[:, keep]
    return W[:, keep].addmm_(W[:, gone], rows, alpha=-1), fewer.addmm_(others, rows, alpha=-1)


def _columns(heads: list[int], width: int) -> list[int]:
    return [head * width + column for head in heads for column in range(width)]
