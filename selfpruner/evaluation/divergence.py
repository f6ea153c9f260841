"""KL(dense || pruned) and next-token loss of many models that share one output head, from their final hidden states.

With p the dense model's distribution at a position, z its logits and delta = (x' - x) W_head^T the change of the logits,

    KL = log E_p[exp delta] - E_p[delta]            NLL = NLL_dense - delta_y + log E_p[exp delta]

so rounding is relative to the change and not to the logits, and a pruned model adds only its delta on the tokens that matter.

*Exact* takes the whole vocabulary. *Compact* takes the ``EXACT`` likeliest tokens under q, and ``SAMPLED`` points placed evenly on
the cumulative mass of q on all others, weighted by p / q. q is half p and half r, the distribution of the mean of the compared
hidden states: where pruned models put mass that the dense one does not, p alone would hardly ever look (the KL came out 2 % too
low). All models are compared on the same tokens, and one gather of head rows serves them all.

The exact value for r is known, so its error on the chosen tokens is known too. It is taken off every model to the extent that the
model's delta is that of r (a control variate). A model that goes astray where the others do not puts its mass on tokens that nobody
chose, so in the end each model's positions of largest KL, one in ``ASTRAY`` of every sequence, are taken exactly (without this one
child in sixteen came out 1.4 % too low, with it 0.3 %). benchmarks/README.md says how near all this is to the exact value. Logits
live for one chunk of positions.

Nothing that is chosen for a position depends on other sequences, so it makes no difference which of them are compared together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfpruner.architectures.kernels import soft_cap, soft_cap_change
from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.exact import PIECE, PIECE_BYTES, ExactSums

EXACT, SAMPLED = 384, 128
ASTRAY = 64
# A vocabulary of fewer than this many times the chosen tokens is taken whole: gathering rows token by token costs more than
# multiplying all of them at once.
_WORTH = 8
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Divergences:
    """Per model and position in nats, (models, sequences, length) float32 on the CPU. ``nll`` is 0 at the last position."""

    kl: Tensor
    nll: Tensor


def divergences(
    head: Tensor,
    norm: Callable[[Tensor], Tensor],
    dense: Tensor,
    finals: Sequence[Tensor],
    tokens: Tensor,
    *,
    exact: bool = False,
    cap: float | None = None,
    memory_bytes: int = 32 << 20,
    cancelled: Callable[[], bool] = lambda: False,
) -> Divergences:
    """Compare the residual streams ``finals`` with ``dense``, all (sequences, length, d) before ``norm``, under ``head`` (V, d).

    Logits are softly capped at ``cap``. ``memory_bytes`` bounds what a chunk of positions takes. Raises CancelledTaskError between
    chunks.
    """
    sequences, length, d = dense.shape
    models, count, vocabulary = len(finals), sequences * length, head.shape[0]
    compact = not exact and vocabulary >= _WORTH * (EXACT + SAMPLED)
    # Compact: first the vocabulary (dense and mean logits, the distribution they share), then the chosen tokens' rows.
    chosen = (EXACT + SAMPLED) * (d * head.element_size() + (models + 1) * 16)
    each = (max(vocabulary * 12, chosen) if compact else PIECE_BYTES) + models * d * 12
    chunk = max(1, min(memory_bytes // each, count))
    target = torch.cat((tokens[:, 1:], tokens.new_full((sequences, 1), -1)), dim=1).flatten().to(dense.device)
    reference, streams = dense.reshape(count, d), [stream.reshape(count, d) for stream in finals]
    position = torch.arange(length, device=dense.device).repeat(sequences)
    kl, nll = torch.zeros(2, models, count, device=dense.device)
    for start in range(0, count if models else 0, chunk):
        if cancelled():
            raise CancelledTaskError("Cancelled during an evaluation.")
        rows = slice(start, start + chunk)
        h = norm(reference[rows])
        changes = torch.stack([norm(stream[rows]) for stream in streams]).sub_(h)
        wanted = target[rows].clamp_min(0)
        found = _compact(head, h, changes, wanted, position[rows], cap) if compact else _exact(head, h, changes, wanted, cap)
        kl[:, rows], nll[:, rows] = found[0], found[1] * (target[rows] >= 0)
    if compact and models:
        worst = kl.view(models, sequences, length).topk(-(-length // ASTRAY), dim=2).indices
        places = worst.add_(torch.arange(sequences, device=kl.device)[:, None] * length).flatten()
        owners = torch.arange(models, device=kl.device).repeat_interleave(len(places) // models)
        few = max(1, chunk // 2)  # logits of both, each position for itself
        for some, whose in zip(places.split(few), owners.split(few), strict=True):
            if cancelled():
                raise CancelledTaskError("Cancelled during an evaluation.")
            h = norm(reference[some])
            changes = torch.stack([norm(streams[model][position]) for model, position in zip(whose, some, strict=True)]).sub_(h)
            alone, loss = _alone(head, h, changes, target[some].clamp_min(0), cap)
            kl[whose, some], nll[whose, some] = alone, loss * (target[some] >= 0)
    shape = (models, sequences, length)
    return Divergences(kl.view(shape).cpu(), nll.view(shape).cpu())


def choose(
    z: Tensor, p: Tensor, r: Tensor, position: Tensor, *, exact: int = EXACT, sampled: int = SAMPLED
) -> tuple[Tensor, Tensor]:
    """Tokens (C, exact + sampled) that stand for p (C, V), the distribution of logits z, and the logarithms of their weights, which
    sum to one. The distribution r (C, V), which is used up as p is, shares the looking.

    Position i of a sequence, ``position`` (C,), starts its points at the fractional part of i * golden ratio: spread evenly, and
    the same every time.
    """
    q = p.add_(r)
    likeliest = q.topk(exact, sorted=False)
    cumulative = torch.cumsum(q.scatter_(1, likeliest.indices, 0.0), 1, out=r)
    mass = cumulative[:, -1:]
    first = position.double().mul_(_GOLDEN).frac_()
    points = (torch.arange(sampled, device=z.device) + first[:, None]) / sampled
    # A point is never quite at an end of the mass, where rounding may put it beside the tokens that have any.
    drawn = torch.searchsorted(cumulative, points.float().clamp_(1e-6, 1 - 1e-6) * mass).clamp_max_(z.shape[1] - 1)
    tokens = torch.cat((likeliest.indices, drawn), dim=1)
    weights = z.gather(1, tokens)
    weights[:, exact:] += (mass / sampled).log() - q.gather(1, drawn).log()
    # No mass outside the likeliest tokens: 0 / 0, which weighs nothing.
    weights = weights.where(weights.isfinite(), -torch.inf)
    return tokens, weights.log_softmax(-1)


def _compact(
    head: Tensor, h: Tensor, changes: Tensor, wanted: Tensor, position: Tensor, cap: float | None
) -> tuple[Tensor, Tensor]:
    """(KL, NLL), each (models, C), of ``changes`` (models, C, d) of the hidden states h; ``wanted`` (C,) the next tokens."""
    # A model that broke down must not decide where the others are looked at.
    sound = changes.isfinite().all(-1, keepdim=True)
    mean = (changes.where(sound, 0.0).sum(0) / sound.sum(0).clamp_min(1)).to(head.dtype)
    z, common = F.linear(torch.cat((h.to(head.dtype), mean)), head).float().chunk(2)
    z = soft_cap(z, cap)
    common = soft_cap_change(common, z, cap)
    own = z.gather(1, wanted[:, None]).squeeze(1)
    p, base = _softmax(z.clone())
    expected_of_mean = torch.linalg.vecdot(p, common)
    r, grown_of_mean = _softmax(common.add_(z))
    tokens, log_p = choose(z, p, r, position)
    chosen = None if cap is None else z.gather(1, tokens)[:, None]
    del z, common, p, r
    narrow = torch.cat((changes.to(head.dtype), mean[None]))
    rows = head.index_select(0, tokens.flatten()).view(*tokens.shape, -1)
    delta = torch.bmm(narrow.transpose(0, 1), rows.transpose(1, 2)).float()
    if chosen is not None:
        delta = soft_cap_change(delta, chosen, cap)
    log_p, weights = log_p[:, None], log_p.exp()[:, None]
    expected = torch.linalg.vecdot(weights, delta)
    centred = delta - expected[..., None]
    like_mean = torch.linalg.vecdot(centred, weights * centred[:, -1:])
    like_mean = (like_mean / like_mean[:, -1:].clamp_min(torch.finfo(torch.float32).tiny)).clamp_(0, 1.5)
    # Less what the weights themselves come to, so that no change is no divergence, to the last bit.
    grown = delta.add_(log_p).logsumexp(-1) - log_p.logsumexp(-1)
    grown += like_mean * (grown_of_mean - base - grown[:, -1])[:, None]
    expected += like_mean * (expected_of_mean - expected[:, -1])[:, None]
    grown, expected = grown[:, :-1].T, expected[:, :-1].T
    of_wanted = soft_cap_change(torch.linalg.vecdot(narrow[:-1].float(), head[wanted].float()), own, cap)
    return grown - expected, base - own - of_wanted + grown


def _alone(head: Tensor, h: Tensor, changes: Tensor, wanted: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """(KL, NLL), each (C,), of changes (C, d) of hidden states h (C, d) over the whole vocabulary, each with a state of its own."""
    z, delta = F.linear(torch.cat((h, changes)).to(head.dtype), head).float().chunk(2)
    z = soft_cap(z, cap)
    delta = soft_cap_change(delta, z, cap)
    base = z.logsumexp(-1)
    chosen = (z + delta).gather(1, wanted[:, None]).squeeze(1)
    expected = torch.linalg.vecdot((z - base[:, None]).exp_(), delta)
    grown = delta.add_(z).logsumexp(-1)
    return grown - base - expected, grown - chosen


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution (C, V) of logits z, in their place, and log sum exp z (C,)."""
    top = z.amax(-1, keepdim=True)
    mass = z.sub_(top).exp_().sum(-1, keepdim=True)
    return z.div_(mass), (top + mass.log_()).squeeze(-1)


def _exact(head: Tensor, h: Tensor, changes: Tensor, wanted: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """The same over the whole vocabulary."""
    sums = ExactSums(wanted, len(changes))
    narrow, changes = h.to(head.dtype), changes.to(head.dtype)
    for first in range(0, len(head), PIECE):
        sums.add(slice(None), first, head[first : first + PIECE], narrow, list(changes), cap)
    return sums.divergences()
