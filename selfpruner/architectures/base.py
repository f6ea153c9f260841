"""Where a decoder's units are, and how one block computes with fewer of them. One subclass per model family.

The evaluation engine, the statistics and the exporter see a model only through :class:`Architecture`: embeddings, per-layer
weights, rotary table, final norm and head. Blocks are plain functions of plain weights. A pruned block is the same function with
narrower matrices, so it really computes less.

Shapes: d = hidden size, h = head_dim, H = query heads, K = KV groups, r = H / K, F = FFN channels, T = tokens.
The residual stream stays in float32; matrix products run in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from selfpruner.architectures.kernels import LONG, QUERIES, causal_in_blocks, rms_norm, rotate, soft_cap
from selfpruner.architectures.modules import Decoder, Submodule
from selfpruner.architectures.weights import AttentionWeights, FfnWeights
from selfpruner.errors import UnsupportedModelError
from selfpruner.models.family_layouts import LAYOUTS, Layout
from selfpruner.models.streaming import LayerStream, StreamedHead


class Architecture:
    """A loaded model of one family, seen as embeddings, layers of two blocks, and a head.

    Subclasses set ``family`` and override what differs; where the family's matrices are its layout says (see
    :mod:`selfpruner.models.family_layouts`). Raises UnsupportedModelError for forms of the family that cannot be worked on.
    """

    family: ClassVar[str] = ""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.layout: Layout = LAYOUTS[self.family]
        if why := self.layout.refusal(self.config.to_dict()):
            raise UnsupportedModelError(f"This model is not supported. {why}", param="model")
        self.decoder = cast(Decoder, model.get_submodule(self.layout.decoder))
        layers = self.decoder.layers
        if not len(layers):
            raise UnsupportedModelError("The model has no decoder layers.", param="model")
        self.head_dim = int(layers[0].self_attn.head_dim)
        self.heads = int(self.module(0, "o").in_features) // self.head_dim
        self.kv_groups = int(getattr(self.config, "num_key_value_heads", None) or self.heads)
        if self.heads % self.kv_groups:
            raise UnsupportedModelError(f"{self.heads} query heads do not divide into {self.kv_groups} KV groups.", param="model")
        self.heads_per_group = self.heads // self.kv_groups
        self.channels = int(self.module(0, "down").in_features)
        self.hidden = int(self.config.hidden_size)
        self.vocabulary = int(self.config.vocab_size)
        self.layers = len(layers)
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[getattr(self.config, self.layout.activation_key)]
        self.cap: float | None = getattr(self.config, "final_logit_softcapping", None)  # of the head's product
        self.last_norm = self.decoder.get_submodule(self.layout.final_norm)
        self.eps = float(getattr(self.config, "rms_norm_eps", 0.0))
        self.dtype: torch.dtype = self.last_norm.weight.dtype
        self.device: torch.device = self.last_norm.weight.device
        # Set when weights stay in their files (see models.streaming): a layer has to be asked for before it is looked at.
        self.stream: LayerStream | None = getattr(model, "layer_stream", None)

    # -- the parts of the model --------------------------------------------------------------------------------------
    def attention(self, layer: int) -> AttentionWeights:
        """The layer's attention; of a streamed model valid until another layer is asked for, as :meth:`ffn` is."""
        if self.stream is not None:
            self.stream.present(layer)
        rows = self.heads * self.head_dim, self.kv_groups * self.head_dim
        weights, biases = self._parts(layer, self.layout.attention, {"q": rows[0], "k": rows[1], "v": rows[1], "o": self.hidden})
        module = self.decoder.layers[layer].self_attn
        norms = {f"{part}_norm": _weight(getattr(module, f"{part}_norm", None)) for part in ("q", "k")}
        return AttentionWeights(
            weights["q"],
            weights["k"],
            weights["v"],
            weights["o"],
            self.kv_groups,
            self.heads_per_group,
            self.head_dim,
            **biases,
            **norms,
        )

    def ffn(self, layer: int) -> FfnWeights:
        if self.stream is not None:
            self.stream.present(layer)
        return self.present_ffn(layer)

    def present_ffn(self, layer: int) -> FfnWeights:
        """The same without asking for a streamed layer: its tensors that are in memory."""
        rows = {"gate": self.channels, "up": self.channels, "down": self.hidden}
        weights, biases = self._parts(layer, self.layout.ffn, rows)
        return FfnWeights(weights.get("gate"), weights["up"], weights["down"], **biases)

    def _parts(
        self, layer: int, places: Mapping[str, str], rows: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Matrices by part and biases by ``<part>_bias``, views of the modules' rows; ``rows`` says how many a part has."""
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor | None] = {}
        begin: dict[str, int] = {}
        for part, place in places.items():
            module = self.decoder.layers[layer].get_submodule(place)
            start = begin.get(place, 0)
            begin[place] = stop = start + rows[part]
            weights[part] = module.weight.detach()[start:stop]
            biases[f"{part}_bias"] = None if module.bias is None else module.bias.detach()[start:stop]
        return weights, biases

    def module(self, layer: int, part: str) -> Submodule:
        """The module of the matrix ``part`` (``q`` .. ``down``) of a layer."""
        place = {**self.layout.attention, **self.layout.ffn}[part]
        return self.decoder.layers[layer].get_submodule(place)

    def has_bias(self, layer: int, part: str) -> bool:
        """Whether the matrix ``part`` (``o``, ``down``) of a layer has a bias."""
        return self.module(layer, part).bias is not None

    def window(self, layer: int) -> int | None:
        """Sliding-window length of the layer's attention, None for full causal attention."""
        types = getattr(self.config, "layer_types", None)
        if types is not None and types[layer] != "sliding_attention":
            return None
        size = getattr(self.config, "sliding_window", None)
        if size is None or (types is None and not getattr(self.config, "use_sliding_window", True)):
            return None
        return int(size)

    @property
    def positions(self) -> int:
        """How many tokens the model was made to see at once; with learned positions there are no more."""
        return int(self.config.max_position_embeddings)

    # -- computing ---------------------------------------------------------------------------------------------------
    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:  # noqa: ARG002 - some families' embeddings know the position
        """(B, S) token ids, the first at position ``start``, to the float32 residual stream (B, S, d)."""
        return self.decoder.embed_tokens(tokens).float()

    def embed_exactly(self, tokens: Tensor) -> Tensor:
        """What :meth:`embed` would be if the weights were float32 numbers: the same, where nothing is computed with the rows."""
        return self.embed(tokens)

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (S, h) for positions 0..S-1, by the model's own rotary module (any scaling it has)."""
        positions = torch.arange(length, device=self.device)[None]
        probe = torch.zeros(1, length, self.hidden, dtype=torch.float32, device=self.device)
        cos, sin = self.decoder.rotary_emb(probe, positions)
        return cos[0], sin[0]

    def final_norm(self, x: Tensor) -> Tensor:
        return self.normalize(self.last_norm, x)

    def logits(self, x: Tensor) -> Tensor:
        """What the model says of final hidden states x (..., d), after the norm, in the weights' dtype: (..., V)."""
        logits: Tensor = self.model.lm_head(x.to(self.dtype))
        return soft_cap(logits, self.cap)

    def head_pieces(self) -> Iterator[tuple[int, Tensor]] | None:
        """(first token, rows of the head) over the vocabulary where the head is not held whole, else None."""
        head = self.model.lm_head
        return head.pieces() if isinstance(head, StreamedHead) else None

    @property
    def piece_width(self) -> int:
        """Tokens of the vocabulary in one piece of the head."""
        head = self.model.lm_head
        return head.rows if isinstance(head, StreamedHead) else self.vocabulary

    @property
    def head_weight(self) -> Tensor:
        """(V, d). A streamed model has it only where the whole matrix is held; :meth:`logits` always works."""
        weight: Tensor = self.model.lm_head.weight
        return weight.detach()

    def attention_norm(self, layer: int, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What q, k and v see: residual x (B, S, d), normalised, in ``dtype`` (x's own)."""
        return self.normalize(self.decoder.layers[layer].get_submodule(self.layout.attention_norms[0]), x, dtype)

    def ffn_norm(self, layer: int, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What gate and up see: residual x (B, S, d), normalised, in ``dtype`` (x's own)."""
        return self.normalize(self.decoder.layers[layer].get_submodule(self.layout.ffn_norms[0]), x, dtype)

    def normalize(self, norm: Submodule, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x through a norm module of the family, computed in float32 and returned in ``dtype`` (x's own)."""
        return rms_norm(x, norm.weight.detach(), self.eps, dtype)

    def attention_inputs(self, layer: int, x: Tensor, w: AttentionWeights, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What o sees: residual x (B, S, d) to head outputs (B, S, K*r*h) in the weights' dtype."""
        return self.mix(layer, *self.queries_keys_values(layer, x, w, rope))

    def queries_keys_values(
        self, layer: int, x: Tensor, w: AttentionWeights, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, K*r, S, h), k and v (B, K, S, h) of the residual x (B, S, d), with positions in them, in the weights' dtype."""
        batch, length, _ = x.shape
        n = self.attention_norm(layer, x, w.q.dtype)
        q = F.linear(n, w.q, w.q_bias).view(batch, length, -1, w.head_dim)
        k = F.linear(n, w.k, w.k_bias).view(batch, length, -1, w.head_dim)
        v = F.linear(n, w.v, w.v_bias).view(batch, length, -1, w.head_dim).transpose(1, 2)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, self.eps), rms_norm(k, w.k_norm, self.eps)
        q, k = (self.place(layer, heads, rope).to(v.dtype).transpose(1, 2) for heads in (q, k))
        return q, k, v

    def mix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q (B, K*r, S, h) on k and v (B, K, S, h), as (B, S, K*r*h)."""
        length, window = q.shape[2], self.window(layer)
        mask = None
        if window is not None and length > window:
            i = torch.arange(length, device=q.device)
            mask = (i[:, None] >= i) & (i[:, None] - i < window)
        if mask is None and q.device.type == "cpu" and QUERIES < length < LONG:
            return causal_in_blocks(q, k, v, self.softmax_scale).flatten(2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=q.shape[1] > k.shape[1]
        )
        return out.transpose(1, 2).flatten(2)

    def place(self, layer: int, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ARG002 - some families' layers differ
        """Queries or keys (B, S, heads, h) with their positions in them."""
        return rotate(heads, rope)

    @property
    def softmax_scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def score_cap(self) -> float | None:
        """The soft cap on attention's scores."""
        return None

    def ffn_inputs(self, layer: int, x: Tensor, w: FfnWeights) -> Tensor:
        """What down sees: residual x (B, S, d) to channels (B, S, F) in the weights' dtype."""
        n = self.ffn_norm(layer, x, w.up.dtype)
        up = F.linear(n, w.up, w.up_bias)
        if w.gate is None:
            return self.activation(up)
        gate = self.activation(F.linear(n, w.gate, w.gate_bias))
        return gate * up if torch.is_grad_enabled() else gate.mul_(up)

    def attention_update(self, layer: int, x: Tensor, w: AttentionWeights, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What the attention block adds to the residual x (B, S, d), in the weights' dtype."""
        return self.attention_output(layer, self.attention_inputs(layer, x, w, rope), w)

    def attention_output(self, layer: int, z: Tensor, w: AttentionWeights) -> Tensor:  # noqa: ARG002 - some families have norms here
        """The attention block's update from what o sees, z (B, S, K*r*h)."""
        return F.linear(z, w.o, w.o_bias)

    def ffn_update(self, layer: int, x: Tensor, w: FfnWeights) -> Tensor:
        """What the FFN block adds to the residual x (B, S, d), in the weights' dtype."""
        return self.ffn_output(layer, self.ffn_inputs(layer, x, w), w)

    def ffn_output(self, layer: int, z: Tensor, w: FfnWeights) -> Tensor:  # noqa: ARG002
        """The FFN block's update from what down sees, z (B, S, F)."""
        return F.linear(z, w.down, w.down_bias)

    def attend(self, layer: int, x: Tensor, w: AttentionWeights | None, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The residual stream after the attention block; None is a block that was dropped."""
        return x if w is None else x + self.attention_update(layer, x, w, rope)

    def feed_forward(self, layer: int, x: Tensor, w: FfnWeights | None) -> Tensor:
        """The residual stream after the FFN block; None is a block that was dropped."""
        return x if w is None else x + self.ffn_update(layer, x, w)


def _weight(module: Submodule | None) -> Tensor | None:
    return None if module is None else module.weight.detach()
