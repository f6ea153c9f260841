"""Gemma 3's text models: Gemma 2's blocks with RMS norms on q and k, without caps, and rotary tables by type of layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from selfpruner.architectures.gemma2 import Gemma2
from selfpruner.architectures.kernels import rotate
from selfpruner.architectures.weights import AttentionWeights


class Gemma3(Gemma2):
    family = "gemma3_text"

    def attention(self, layer: int) -> AttentionWeights:
        w = super().attention(layer)
        assert w.q_norm is not None
        assert w.k_norm is not None
        return replace(w, q_norm=1 + w.q_norm.float(), k_norm=1 + w.k_norm.float())

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (types, S, h), one table for each type of layer."""
        positions = torch.arange(length, device=self.device)[None]
        probe = torch.zeros(1, length, self.hidden, dtype=torch.float32, device=self.device)
        tables = [self.decoder.rotary_emb(probe, positions, kind) for kind in self._kinds]
        return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])

    def place(self, layer: int, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        kind = self._kinds.index(self.config.layer_types[layer])
        return rotate(heads, (rope[0][kind], rope[1][kind]))

    @property
    def score_cap(self) -> float | None:
        return None  # whatever its config says

    @property
    def _kinds(self) -> list[str]:
        return sorted(set(self.config.layer_types))
