"""Exact comparison of positions over a vocabulary of which a piece is looked at at a time.

For a token with dense logits z and a pruned model's logits z + delta, three running sums over the vocabulary are kept, relative to
running maxima: s = sum exp(z - m), e = sum exp(z - m) delta and s' = sum exp(z + delta - m'). Then

    KL(dense || pruned) = m' + log s' - m - log s - e / s

so that, as with whole logits, rounding is relative to the change and not to the logits. Memory is a few (positions, piece) arrays
of floats, whatever the vocabulary. That is not only for vocabularies that do not fit: products of many positions with few tokens
of the vocabulary are as fast as a machine multiplies, and what comes of them stays in a CPU's caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfpruner.architectures.kernels import soft_cap, soft_cap_change

# Tokens of a held vocabulary that are looked at at a time, and bytes of one position's logits of them.
PIECE = 2048
PIECE_BYTES = 20 * PIECE


class ExactSums:
    """The sums of positions whose next tokens are ``wanted`` (count,), for so many ``models`` beside the dense one."""

    def __init__(self, wanted: Tensor, models: int) -> None:
        self._wanted = wanted
        self._base = _Sums(wanted)
        self._pruned = [_Sums(wanted) for _ in range(models)]

    def add(self, part: slice, first: int, piece: Tensor, h: Tensor, changes: Sequence[Tensor], cap: float | None) -> None:
        """Add a ``piece`` (n, d) of the head, which begins with the token ``first``, to the positions ``part``, whose final hidden
        states are h (C, d), and h + change in the other models. Logits are softly capped at ``cap``."""
        offset = self._wanted[part] - first
        inside, index = (offset >= 0) & (offset < len(piece)), offset.clamp(0, len(piece) - 1)[:, None]
        z = soft_cap(F.linear(h.to(piece.dtype), piece).float(), cap)
        p, shrink = self._base.add(part, z)
        own = z.gather(1, index).squeeze(1)
        for change, sums in zip(changes, self._pruned, strict=True):
            delta = soft_cap_change(F.linear(change.to(piece.dtype), piece).float(), z, cap)
            sums.change[part] = sums.change[part] * shrink + torch.linalg.vecdot(p, delta)
            sums.chosen[part] += (own + delta.gather(1, index).squeeze(1)) * inside
            sums.add(part, delta.add_(z))

    def divergences(self) -> tuple[Tensor, Tensor]:
        """(KL, NLL), each (models, count), once the whole vocabulary was added."""
        total = self._base.logsumexp()
        grown = [sums.logsumexp() for sums in self._pruned]
        kl = [more - total - sums.change / self._base.total for more, sums in zip(grown, self._pruned, strict=True)]
        nll = [more - sums.chosen for more, sums in zip(grown, self._pruned, strict=True)]
        return torch.stack(kl), torch.stack(nll)


class _Sums:
    """Running sums of positions: ``total`` of exp(logit - ``top``), ``change`` as in the module's formula, the ``chosen`` logit."""

    def __init__(self, wanted: Tensor) -> None:
        self.top = torch.full(wanted.shape, -torch.inf, device=wanted.device)
        self.total, self.change, self.chosen = torch.zeros(3, *wanted.shape, device=wanted.device)

    def add(self, part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add a piece (C, n); returns exp(logits - top) and what older sums were multiplied with."""
        top = torch.maximum(self.top[part], logits.amax(-1))
        shrink = (self.top[part] - top).exp_()
        weights = (logits - top[:, None]).exp_()
        self.total[part] = self.total[part] * shrink + weights.sum(-1)
        self.top[part] = top
        return weights, shrink

    def logsumexp(self) -> Tensor:
        grown: Tensor = self.top + self.total.log()
        return grown
