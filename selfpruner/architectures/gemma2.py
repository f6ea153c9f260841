"""Gemma 2: norms before and after each block, soft caps on attention and logits, windows in every other layer, scaled embeddings.

The output of a block goes through a norm before it is added to the residual stream. Statistics, errors and repairs refer to the
output matrix W, before that norm: if W x is unchanged, so is what the norm makes of it, and refitted weights and FLAP's bias mean
what they mean elsewhere. A token weighs as much as its W x is large, although the norm removes that size; the weight of a block
against the others does not depend on it, because probes measure it on the stream. A dropped block takes both of its norms with it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from selfpruner.architectures.base import Architecture
from selfpruner.architectures.kernels import QUERIES, rms_norm, soft_cap
from selfpruner.architectures.modules import Submodule
from selfpruner.architectures.weights import AttentionWeights, FfnWeights
from selfpruner.models.streaming import StreamedEmbedding


class Gemma2(Architecture):
    family = "gemma2"

    def normalize(self, norm: Submodule, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return rms_norm(x, 1 + norm.weight.detach().float(), self.eps, dtype)

    def embed_exactly(self, tokens: Tensor) -> Tensor:
        table = self.decoder.embed_tokens
        rows = table.rows(tokens) if isinstance(table, StreamedEmbedding) else F.embedding(tokens, table.weight.detach())
        return rows.float() * math.sqrt(self.hidden)  # 16 bits round the root, and then the product

    def attention_output(self, layer: int, z: Tensor, w: AttentionWeights) -> Tensor:
        after = self.decoder.layers[layer].get_submodule(self.layout.attention_norms[1])
        return self.normalize(after, super().attention_output(layer, z, w))

    def ffn_output(self, layer: int, z: Tensor, w: FfnWeights) -> Tensor:
        after = self.decoder.layers[layer].get_submodule(self.layout.ffn_norms[1])
        return self.normalize(after, super().ffn_output(layer, z, w))

    @property
    def softmax_scale(self) -> float:
        return float(self.config.query_pre_attn_scalar**-0.5)

    @property
    def score_cap(self) -> float | None:
        cap = self.config.attn_logit_softcapping
        return None if cap is None else float(cap)

    def mix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.score_cap is None:
            return super().mix(layer, q, k, v)
        return _capped_in_blocks(q, k, v, self.softmax_scale, self.score_cap, self.window(layer))


def _capped_in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, window: int | None) -> Tensor:
    """Causal attention of q (B, K*r, S, h) on k and v (B, K, S, h) with capped scores, as (B, S, K*r*h).

    torch's kernels have no cap. QUERIES positions at a time, so that the scores of a whole sequence never exist together.
    """
    length, groups = q.shape[2], k.shape[1]
    grouped = q.unflatten(1, (groups, -1))
    positions = torch.arange(length, device=q.device)
    parts = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        first = 0 if window is None else max(0, start - window + 1)
        i, j = positions[start:stop, None], positions[first:stop]
        hidden = (j > i) if window is None else (j > i) | (i - j >= window)
        scores = (grouped[:, :, :, start:stop] @ k[:, :, None, first:stop].transpose(3, 4)).float() * scale
        weights = soft_cap(scores, cap).masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        parts.append(weights @ v[:, :, None, first:stop])
    return torch.cat(parts, 3).permute(0, 3, 1, 2, 4).flatten(2)
