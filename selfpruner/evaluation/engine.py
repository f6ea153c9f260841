"""The evaluation engine: all plans of a generation in one walk over the layers.

A population is a set of level vectors. At each block the engine holds one residual stream per *distinct prefix* of levels, and
every distinct prefix passes the block once; plans that agree on their first blocks share that work, with each other
and with the dense model, which walks along as the reference. Streams at the same level are joined and pass as one wide batch.

KL is taken from the difference of final hidden states: with the dense logits z and the change delta = (x' - x) W_head^T,

    KL(dense || pruned) = logsumexp(z + delta) - logsumexp(z) - sum_v p_v delta_v

so rounding in bfloat16 is relative to the change and not to the logits. Dense logits are recomputed chunk by chunk from the
final hidden state, never kept.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights
from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.pieces import compare_in_pieces
from selfpruner.patterns import PrunableAttention, PrunableFfn
from selfpruner.space import Plan

Weights = AttentionWeights | FfnWeights | None


@dataclass(frozen=True, slots=True)
class Score:
    """Means per token in nats: ``kl`` over all positions, ``nll`` over the positions that have a next token."""

    kl: float
    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))


@dataclass(frozen=True, slots=True)
class Work:
    """What a walk cost: block passes really made, and how many there would be without sharing."""

    passes: int
    passes_without_sharing: int


class LevelCache:
    """Materialised weights of levels, least recently used out first. Only what is not a view of the model counts."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[tuple[int, int], tuple[Weights, int]] = OrderedDict()

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def get(self, block: int, level: int, make: Callable[[int], Weights]) -> Weights:
        key = (block, level)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        weights = make(level)
        size = 0 if level == 0 else _own_bytes(weights)
        self._entries[key] = (weights, size)
        self.bytes += size
        while self.bytes > self.max_bytes and len(self._entries) > 1:
            _, (_, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
        return weights


class Engine:
    """Scores plans of one model on token batches.

    ``blocks`` are in plan order: attention and FFN of layer 0, of layer 1, and so on. ``max_tokens`` bounds the tokens that
    pass a block at once (rows of its widest activation), ``cache_bytes`` the materialised levels kept between walks,
    ``logit_bytes`` the logits in work at a time.
    """

    def __init__(
        self,
        arch: Architecture,
        blocks: Sequence[PrunableAttention | PrunableFfn],
        *,
        max_tokens: int = 4096,
        stream_bytes: int = 192 * 2**20,
        cache_bytes: int = 128 * 2**20,
        logit_bytes: int = 256 * 2**20,
    ) -> None:
        self.arch = arch
        self.logit_bytes = logit_bytes
        self.blocks = list(blocks)
        self.max_tokens = max_tokens
        self.stream_bytes = stream_bytes
        self.cache = LevelCache(cache_bytes)
        self.work = Work(0, 0)

    def weights(self, block: int, level: int) -> Weights:
        prunable = self.blocks[block]
        return prunable.renewed(level, self.cache.get(block, level, prunable.weights))

    def evaluate(self, plans: Sequence[Plan], tokens: Tensor, *, cancelled: Callable[[], bool] = lambda: False) -> list[Score]:
        """Score every plan on ``tokens`` (sequences, length), in the given order. Equal plans are computed once.

        Sequences are taken in batches whose residual streams fit ``stream_bytes``. Raises CancelledTaskError between blocks.
        """
        unique = list(dict.fromkeys(plan.levels for plan in plans))
        per_sequence = tokens.shape[1] * self.arch.hidden * 4 * (len(unique) + 1)
        batch = max(1, min(self.stream_bytes // per_sequence, tokens.shape[0]))
        totals = {levels: torch.zeros(2, dtype=torch.float64) for levels in unique}
        with torch.no_grad():
            for part in tokens.split(batch):
                dense, finals = self._walk(unique, part.to(self.arch.device), cancelled)
                for levels, sums in zip(unique, self._compare(dense, finals, part.to(self.arch.device), cancelled), strict=True):
                    totals[levels] += sums
        count = tokens.numel()
        predicted = tokens.shape[0] * (tokens.shape[1] - 1)
        scores = {levels: Score(float(total[0]) / count, float(total[1]) / predicted, count) for levels, total in totals.items()}
        return [scores[plan.levels] for plan in plans]

    # -- walking -----------------------------------------------------------------------------------------------------
    def _walk(self, plans: Sequence[tuple[int, ...]], tokens: Tensor, cancelled: Callable[[], bool]) -> tuple[Tensor, list[Tensor]]:
        """Final residual streams (B, S, d): the dense model's, and one per plan."""
        rope = self.arch.rope(tokens.shape[1])
        dense = (0,) * len(self.blocks)
        rows = [dense, *plans]
        node = [0] * len(rows)  # which stream each row follows
        streams = [self.arch.embed(tokens)]
        passes = 0
        for block in range(len(self.blocks)):
            if cancelled():
                raise CancelledTaskError("Cancelled during an evaluation.")
            following = sorted({(node[row], levels[block]) for row, levels in enumerate(rows)}, key=lambda pair: (pair[1], pair[0]))
            place = {pair: index for index, pair in enumerate(following)}
            after: list[Tensor] = []
            for level in sorted({level for _, level in following}):
                parents = [streams[parent] for parent, at in following if at == level]
                after += self._pass(block, level, parents, rope)
            passes += len(following)
            node = [place[node[row], levels[block]] for row, levels in enumerate(rows)]
            streams = after
        self.work = Work(self.work.passes + passes, self.work.passes_without_sharing + len(rows) * len(self.blocks))
        return streams[node[0]], [streams[index] for index in node[1:]]

    def _pass(self, block: int, level: int, parents: list[Tensor], rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Streams (B, S, d) through one block at one level, as wide as ``max_tokens`` allows."""
        weights = self.weights(block, level)
        layer, is_ffn = divmod(block, 2)
        wide = max(1, self.max_tokens // (parents[0].shape[0] * parents[0].shape[1]))
        out: list[Tensor] = []
        for start in range(0, len(parents), wide):
            joined = torch.cat(parents[start : start + wide])
            if is_ffn:
                assert weights is None or isinstance(weights, FfnWeights)
                result = self.arch.feed_forward(layer, joined, weights)
            else:
                assert weights is None or isinstance(weights, AttentionWeights)
                result = self.arch.attend(layer, joined, weights, rope)
            out += result.split(parents[0].shape[0])
        return out

    # -- comparing ---------------------------------------------------------------------------------------------------
    def _compare(
        self, dense: Tensor, finals: Sequence[Tensor], tokens: Tensor, cancelled: Callable[[], bool], chunk: int = 128
    ) -> list[Tensor]:
        """Per plan the sums (KL, negative log-likelihood) over this batch, float64 (2,)."""
        sequences, length = tokens.shape
        target = torch.cat((tokens[:, 1:], tokens.new_full((sequences, 1), -1)), dim=1).flatten()
        reference = self.arch.final_norm(dense).flatten(0, 1)
        states = [self.arch.final_norm(x).flatten(0, 1) for x in finals]
        pieces = self.arch.head_pieces()
        if pieces is not None:
            rows_at_once = max(16, self.logit_bytes // (16 * self.arch.piece_width))
            return compare_in_pieces(pieces, reference, states, target, rows=rows_at_once, cancelled=cancelled)
        chunk = max(8, min(chunk, self.logit_bytes // (16 * self.arch.vocabulary)))
        sums = [torch.zeros(2, dtype=torch.float64) for _ in finals]
        for start in range(0, sequences * length, chunk):
            if cancelled():
                raise CancelledTaskError("Cancelled during an evaluation.")
            rows = slice(start, start + chunk)
            h = reference[rows]
            z = self.arch.logits(h).float()
            base = z.logsumexp(-1)
            p = (z - base[:, None]).exp_()
            wanted = target[rows]
            known = wanted >= 0
            index = wanted.clamp_min(0)[:, None]
            for state, total in zip(states, sums, strict=True):
                delta = self.arch.logits(state[rows] - h).float()
                expected = torch.linalg.vecdot(p, delta)
                chosen = (z.gather(1, index) + delta.gather(1, index)).squeeze(1)
                lse = delta.add_(z).logsumexp(-1)
                kl = (lse - base - expected).double().sum()
                nll = (lse - chosen)[known].double().sum()
                total += torch.stack((kl, nll)).cpu()
        return sums


def _own_bytes(weights: Weights) -> int:
    """Bytes a materialised level owns. Gate and up of an FFN are views of the ordered channels and cost nothing more."""
    if weights is None:
        return 0
    if isinstance(weights, FfnWeights):
        owned = [weights.down, weights.down_bias]
    else:
        owned = [weights.q, weights.k, weights.v, weights.o, weights.o_bias]
    return sum(t.numel() * t.element_size() for t in owned if t is not None)
