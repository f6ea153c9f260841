"""OPT: biases everywhere, LayerNorm before each block, learned positions, an FFN without a gate, one KV head per query head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfpruner.architectures.base import Architecture
from selfpruner.architectures.modules import Submodule


class Opt(Architecture):
    family = "opt"

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        table = self.decoder.embed_positions
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device) + table.offset
        return super().embed(tokens) + F.embedding(places, table.weight.detach()).float()

    def rope(self, length: int) -> tuple[Tensor, Tensor]:  # positions are in the embeddings
        none = torch.empty(length, 0, device=self.device)
        return none, none

    def place(self, layer: int, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ARG002
        return heads

    def normalize(self, norm: Submodule, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        assert norm.bias is not None
        weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, norm.eps).to(dtype or x.dtype)
