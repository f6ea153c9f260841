"""One token after another: rows of text that a model writes in step, with their keys and values kept."""

from __future__ import annotations

import torch
from torch import Tensor

from selfpruner.architectures.base import Architecture
from selfpruner.architectures.kernels import soft_cap
from selfpruner.architectures.weights import AttentionWeights, FfnWeights


class Decoding:
    """``rows`` texts of up to ``length`` tokens, all equally long at any time. Every pass adds one token to each.

    Holds :func:`cache_bytes` of keys and values. Of a streamed model every pass reads all layers.
    """

    def __init__(self, arch: Architecture, rows: int, length: int) -> None:
        self.arch = arch
        self.written = 0
        self._rope = arch.rope(length)
        shape = rows, arch.kv_groups, length, arch.head_dim
        self._keys, self._values = (
            [torch.empty(shape, dtype=arch.dtype, device=arch.device) for _ in range(arch.layers)] for _ in range(2)
        )
        self._weights = [self._layer(layer) for layer in range(arch.layers)] if arch.stream is None else None

    def logits(self, tokens: Tensor) -> Tensor:
        """What follows the texts with ``tokens`` (rows,) added to them: (rows, V) in the weights' dtype."""
        arch, at = self.arch, self.written
        x = arch.embed(tokens[:, None], at)
        rope = self._rope[0][..., at : at + 1, :], self._rope[1][..., at : at + 1, :]
        for layer in range(arch.layers):
            attention, ffn = self._layer(layer) if self._weights is None else self._weights[layer]
            q, k, v = arch.queries_keys_values(layer, x, attention, rope)
            self._keys[layer][:, :, at] = k[:, :, 0]
            self._values[layer][:, :, at] = v[:, :, 0]
            x = x + arch.attention_output(layer, self._mix(layer, q), attention)
            x = arch.feed_forward(layer, x, ffn)
        self.written += 1
        return arch.logits(arch.final_norm(x[:, 0]))

    def _layer(self, layer: int) -> tuple[AttentionWeights, FfnWeights]:
        return self.arch.attention(layer), self.arch.ffn(layer)

    def _mix(self, layer: int, q: Tensor) -> Tensor:
        """Attention of the new tokens, q (rows, K*r, 1, h), to all tokens that they see, as (rows, 1, K*r*h).

        torch's own kernels are made for many queries; on a CPU they take several times as long for one. Here the query heads of
        a group are the columns of one small product, and keys and values are read once, where they lie.
        """
        arch, stop = self.arch, self.written + 1
        window = arch.window(layer)
        first = 0 if window is None else max(0, stop - window)
        keys, values = self._keys[layer][:, :, first:stop], self._values[layer][:, :, first:stop]
        grouped = (q * arch.softmax_scale).view(q.shape[0], arch.kv_groups, -1, arch.head_dim)
        scores = (keys @ grouped.transpose(2, 3)).transpose(2, 3)
        if arch.score_cap is not None:
            scores = soft_cap(scores.float(), arch.score_cap)
        return (scores.softmax(-1).to(values.dtype) @ values).view(q.shape[0], 1, -1)


def cache_bytes(arch: Architecture, length: int) -> int:
    """What the keys and values of one row of ``length`` tokens take."""
    return 2 * arch.layers * arch.kv_groups * arch.head_dim * length * arch.dtype.itemsize
