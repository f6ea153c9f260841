"""SparseGPT's sweep: the kept weights make up for the removed ones, column by column (criteria.md 4.3).

With H = X^T X, damped, and U the upper Cholesky factor of its inverse (H^-1 = U^T U), going through the columns from the left,

    e = (w_j - w'_j) / U_jj        w_k <- w_k - e U_jk  for k > j        for every row, w'_j = 0 where the mask says so,

which is the best that the columns still to come can do about column j. The squared output error that remains is the sum of all e^2.
Frantar & Alistarh 2023, arXiv 2301.00774. The mask may come from anywhere: the sweep repairs any criterion's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selfpruner.calibration.statistics import BlockStatistics
from selfpruner.compensation.base import factored

# Ridge, as a share of the mean diagonal of H; and columns whose changes reach the columns after them together.
DAMPING, COLUMNS = 0.01, 128

Choose = Callable[[int, int, Tensor], Tensor]
"""(start, stop, weights (out, stop - start) as they are now) to the mask (out, stop - start), True = keep."""


def factor(stats: BlockStatistics, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """U (in, in) upper triangular with H^-1 = U^T U, float32, and which inputs never say anything, bool (in,)."""
    H = stats.gram
    dead = H.diagonal() <= 0
    H.diagonal()[dead] = 1.0
    H.diagonal().add_(damping * H.diagonal().mean())
    H = factored(H)
    torch.cholesky_inverse(H, out=H)
    return torch.linalg.cholesky(H, upper=True, out=H).float(), dead


def sweep(W: Tensor, U: Tensor, dead: Tensor, choose: Choose, *, every: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor]:
    """The repaired weights (out, in) float32, the mask that ``choose`` made, and the squared error of every row (out,).

    ``choose`` is asked for ``every`` columns at a time, when all before them are repaired. Weights of inputs that are ``dead`` are
    zero, whatever the mask says.
    """
    W = W.float().clone()
    W[:, dead] = 0
    mask = torch.ones(W.shape, dtype=torch.bool, device=W.device)
    errors = W.new_zeros(len(W), dtype=torch.float64)
    together = max(COLUMNS // every, 1) * every
    for start in range(0, W.shape[1], together):
        stop = min(start + together, W.shape[1])
        block, inner = W[:, start:stop], U[start:stop, start:stop]
        kept = mask[:, start:stop]
        pushed = torch.empty_like(block)
        for column in range(stop - start):
            if column % every == 0:
                ahead = slice(column, column + every)
                kept[:, ahead] = choose(start + column, min(start + column + every, stop), block[:, ahead])
            error = torch.where(kept[:, column], 0.0, block[:, column] / inner[column, column])
            block[:, column:].addr_(error, inner[column, column:], alpha=-1)
            pushed[:, column] = error
        block.masked_fill_(~kept, 0.0)  # zero up to rounding now
        errors += pushed.double().pow(2).sum(1)
        W[:, stop:].addmm_(pushed, U[start:stop, stop:], alpha=-1)
    return W, mask, errors


def repaired(W: Tensor, stats: BlockStatistics, mask: Tensor) -> Tensor:
    """W (out, in) with the weights outside ``mask`` zero and the others moved to make up for them, float32."""
    return sweep(W, *factor(stats), lambda start, stop, _: mask[:, start:stop])[0]
