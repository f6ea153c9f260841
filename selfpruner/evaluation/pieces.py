"""Exact comparison of final hidden states over a vocabulary that comes in pieces; each piece of the head is used once per batch.

For a token with dense logits z and a pruned model's logits z + delta, three running sums over the vocabulary are kept, relative to
running maxima: s = sum exp(z - m), e = sum exp(z - m) delta and s' = sum exp(z + delta - m'). Then

    KL(dense || pruned) = m' + log s' - m - log s - e / s

so that, as with whole logits, rounding is relative to the change and not to the logits. Memory is a few (tokens, piece) arrays of
floats, whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfpruner.architectures.kernels import soft_cap, soft_cap_change
from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.divergence import Divergences


def divergences_in_pieces(
    head: Iterable[tuple[int, Tensor]],
    norm: Callable[[Tensor], Tensor],
    dense: Tensor,
    finals: Sequence[Tensor],
    tokens: Tensor,
    *,
    rows: int,
    cap: float | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Divergences:
    """Compare the residual streams ``finals`` with ``dense``, all (sequences, length, d) before ``norm``.

    ``head`` yields (first token, matrix (piece, d)) over the whole vocabulary; ``rows`` positions are multiplied at a time. Logits
    are softly capped at ``cap``. Raises CancelledTaskError between pieces.
    """
    sequences, length, d = dense.shape
    count = sequences * length
    target = torch.cat((tokens[:, 1:], tokens.new_full((sequences, 1), -1)), dim=1).flatten().to(dense.device)
    reference, streams = dense.reshape(count, d), [stream.reshape(count, d) for stream in finals]
    base = _Sums(count, dense.device)
    pruned = [_Sums(count, dense.device) for _ in finals]
    known = target >= 0
    for first, piece in head:
        if cancelled():
            raise CancelledTaskError("Cancelled during an evaluation.")
        offset = target - first
        inside = known & (offset >= 0) & (offset < piece.shape[0])
        index = offset.clamp(0, piece.shape[0] - 1)[:, None]
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            h = norm(reference[part])
            z = soft_cap(F.linear(h.to(piece.dtype), piece).float(), cap)
            p, shrink = base.add(part, z)
            own = z.gather(1, index[part]).squeeze(1)
            for stream, sums in zip(streams, pruned, strict=True):
                delta = soft_cap_change(F.linear((norm(stream[part]) - h).to(piece.dtype), piece).float(), z, cap)
                sums.change[part] = sums.change[part] * shrink + torch.linalg.vecdot(p, delta)
                sums.chosen[part] += (own + delta.gather(1, index[part]).squeeze(1)) * inside[part]
                sums.add(part, delta.add_(z))
    total = base.logsumexp()
    kl, nll = torch.zeros(2, len(pruned), count)
    for number, sums in enumerate(pruned):
        grown = sums.logsumexp()
        kl[number] = grown - total - sums.change / base.total
        nll[number] = (grown - sums.chosen) * known
    return Divergences(kl.view(-1, sequences, length), nll.view(-1, sequences, length))


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
