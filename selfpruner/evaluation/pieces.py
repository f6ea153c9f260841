"""The comparison of final hidden states over a vocabulary that comes in pieces, exact, each piece of the head used once per batch.

For a token with dense logits z and a pruned model's logits z + delta, three running sums over the vocabulary are kept, relative to
running maxima: s = sum exp(z - m), e = sum exp(z - m) delta and s' = sum exp(z + delta - m'). Then

    KL(dense || pruned) = m' + log s' - m - log s - e / s

so that, as with whole logits, rounding is relative to the change and not to the logits. Memory: some (tokens, piece) arrays of
floats, whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfpruner.errors import CancelledTaskError


def compare_in_pieces(
    head: Iterable[tuple[int, Tensor]],
    reference: Tensor,
    states: Sequence[Tensor],
    target: Tensor,
    *,
    rows: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Tensor]:
    """Per state the sums (KL, negative log-likelihood) over all tokens, float64 (2,).

    ``head`` yields (first token, matrix (piece, d)) over the whole vocabulary; ``reference`` and ``states`` are final hidden states
    (T, d) after the norm; ``target`` (T,) holds the next token, -1 where there is none; ``rows`` tokens are multiplied at a time.
    Raises CancelledTaskError between pieces.
    """
    count = reference.shape[0]
    dense = _Sums(count, reference.device)
    pruned = [_Sums(count, reference.device) for _ in states]
    known = target >= 0
    for first, piece in head:
        if cancelled():
            raise CancelledTaskError("Cancelled during an evaluation.")
        place = target - first
        inside = known & (place >= 0) & (place < piece.shape[0])
        index = place.clamp(0, piece.shape[0] - 1)[:, None]
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            h = reference[part]
            z = F.linear(h.to(piece.dtype), piece).float()
            p, shrink = dense.add(part, z)
            own = z.gather(1, index[part]).squeeze(1)
            for state, sums in zip(states, pruned, strict=True):
                delta = F.linear((state[part] - h).to(piece.dtype), piece).float()
                sums.change[part] = sums.change[part] * shrink + torch.linalg.vecdot(p, delta)
                sums.chosen[part] += (own + delta.gather(1, index[part]).squeeze(1)) * inside[part]
                sums.add(part, delta.add_(z))
    base = dense.logsumexp()
    out = []
    for sums in pruned:
        lse = sums.logsumexp()
        kl = (lse - base - sums.change / dense.total).double().sum()
        nll = (lse - sums.chosen)[known].double().sum()
        out.append(torch.stack((kl, nll)).cpu())
    return out


class _Sums:
    """Running sums of T tokens: ``total`` of exp(logit - ``top``), ``change`` as in the module's formula, the ``chosen`` logit."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.top = torch.full((count,), -torch.inf, device=device)
        self.total, self.change, self.chosen = (torch.zeros(count, device=device) for _ in range(3))

    def add(self, part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add a piece (tokens, piece); returns exp(logits - top) and what older sums were multiplied with."""
        top = torch.maximum(self.top[part], logits.amax(-1))
        shrink = (self.top[part] - top).exp_()
        weights = (logits - top[:, None]).exp_()
        self.total[part] = self.total[part] * shrink + weights.sum(-1)
        self.top[part] = top
        return weights, shrink

    def logsumexp(self) -> Tensor:
        return self.top + self.total.log()
