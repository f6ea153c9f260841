"""Exact comparison of final hidden states over a vocabulary that comes in pieces; each piece of the head is used once per batch.

The sums are those of :mod:`selfpruner.evaluation.exact`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.divergence import Divergences
from selfpruner.evaluation.exact import ExactSums


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
    sums = ExactSums(target, len(finals))
    for first, piece in head:
        if cancelled():
            raise CancelledTaskError("Cancelled during an evaluation.")
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            h = norm(reference[part])
            sums.add(part, first, piece, h, [norm(stream[part]) - h for stream in streams], cap)
    shape = (len(finals), sequences, length)
    if not finals:
        return Divergences(*torch.zeros(2, *shape))
    kl, nll = sums.divergences()
    return Divergences(kl.view(shape).cpu(), (nll * (target >= 0)).view(shape).cpu())
