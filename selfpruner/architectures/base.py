"""Where a decoder's units are, and how one block computes with fewer of them. One subclass per model family.

The evaluation engine, the statistics and the exporter see a model only through :class:`Architecture`: embeddings, per-layer
weights, rotary table, final norm and head. Blocks are plain functions of plain weights, so a pruned block is the same
function with narrower matrices and really computes less.

Shapes: d = hidden size, h = head_dim, H = query heads, K = KV groups, r = H / K, F = FFN channels, T = tokens.
The residual stream stays in float32; matrix products run in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from selfpruner.errors import UnsupportedModelError
from selfpruner.streaming import LayerStream, StreamedHead

# Query positions that attend at once on a CPU, and the length from which torch's own kernel is as good.
QUERIES, LONG = 64, 768


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One attention block. q (K*r*h, d), k and v (K*h, d), o (d, K*r*h); heads of a group are adjacent, as in the checkpoint.

    ``q_norm`` and ``k_norm`` (h,) are Qwen3's RMS norms over a head, shared by all heads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    kv_groups: int
    heads_per_group: int
    head_dim: int
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def keep_heads(self, heads: list[int], kv_groups: int, heads_per_group: int) -> AttentionWeights:
        """The block with only ``heads`` (ascending, ``heads_per_group`` in each kept group); ``o`` is sliced, not repaired."""
        h = self.head_dim
        groups = sorted({head // self.heads_per_group for head in heads})
        rows = _spread(heads, h, self.q.device)
        kv_rows = _spread(groups, h, self.k.device)
        return replace(
            self,
            q=self.q[rows],
            k=self.k[kv_rows],
            v=self.v[kv_rows],
            o=self.o[:, rows],
            q_bias=None if self.q_bias is None else self.q_bias[rows],
            k_bias=None if self.k_bias is None else self.k_bias[kv_rows],
            v_bias=None if self.v_bias is None else self.v_bias[kv_rows],
            kv_groups=kv_groups,
            heads_per_group=heads_per_group,
        )


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """One gated FFN. gate and up (F, d), down (d, F)."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def first_channels(self, count: int) -> FfnWeights:
        """The first ``count`` channels, as views."""
        return replace(
            self,
            gate=self.gate[:count],
            up=self.up[:count],
            down=self.down[:, :count],
            gate_bias=None if self.gate_bias is None else self.gate_bias[:count],
            up_bias=None if self.up_bias is None else self.up_bias[:count],
        )

    def in_order(self, order: Tensor) -> FfnWeights:
        """The channels in the order of the index tensor ``order`` (F,)."""
        return replace(
            self,
            gate=self.gate[order],
            up=self.up[order],
            down=self.down[:, order],
            gate_bias=None if self.gate_bias is None else self.gate_bias[order],
            up_bias=None if self.up_bias is None else self.up_bias[order],
        )


W = TypeVar("W", AttentionWeights, FfnWeights)


def in_float32(weights: W) -> W:
    """The same weights, so that the block computes in float32."""
    values: dict[str, Any] = {field.name: getattr(weights, field.name) for field in fields(weights)}
    changed: dict[str, Any] = {name: value.float() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(weights, **changed)


def _spread(units: list[int], width: int, device: torch.device) -> Tensor:
    """Row indices of the given units of ``width`` rows each."""
    starts = torch.tensor(units, dtype=torch.long, device=device) * width
    return (starts[:, None] + torch.arange(width, device=device)).flatten()


class Architecture:
    """A loaded model of one family, seen as embeddings, layers of two blocks, and a head.

    Subclasses set ``family`` and override what differs. Raises UnsupportedModelError when the model's parts are not where
    the family puts them.
    """

    family: ClassVar[str] = ""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config: Any = model.config
        self.decoder: Any = model.model
        layers = self.decoder.layers
        if not len(layers):
            raise UnsupportedModelError("The model has no decoder layers.", param="model")
        attention, mlp = layers[0].self_attn, layers[0].mlp
        self.head_dim = int(attention.head_dim)
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_groups = attention.k_proj.out_features // self.head_dim
        if self.heads % self.kv_groups:
            raise UnsupportedModelError(f"{self.heads} query heads do not divide into {self.kv_groups} KV groups.", param="model")
        self.heads_per_group = self.heads // self.kv_groups
        self.channels = mlp.gate_proj.out_features
        self.hidden = int(self.config.hidden_size)
        self.vocabulary = int(self.config.vocab_size)
        self.layers = len(layers)
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[self.config.hidden_act]
        self.eps = float(self.config.rms_norm_eps)
        self.dtype: torch.dtype = self.decoder.norm.weight.dtype
        self.device: torch.device = self.decoder.norm.weight.device
        # Set when weights stay in their files (see selfpruner.streaming): a layer has to be asked for before it is looked at.
        self.stream: LayerStream | None = getattr(model, "layer_stream", None)

    # -- the parts of the model --------------------------------------------------------------------------------------
    def attention(self, layer: int) -> AttentionWeights:
        """The layer's attention; of a streamed model valid until another layer is asked for, as :meth:`ffn` is."""
        if self.stream is not None:
            self.stream.present(layer)
        a = self.decoder.layers[layer].self_attn
        return AttentionWeights(
            a.q_proj.weight.detach(),
            a.k_proj.weight.detach(),
            a.v_proj.weight.detach(),
            a.o_proj.weight.detach(),
            self.kv_groups,
            self.heads_per_group,
            self.head_dim,
            _bias(a.q_proj),
            _bias(a.k_proj),
            _bias(a.v_proj),
            _bias(a.o_proj),
            _weight(getattr(a, "q_norm", None)),
            _weight(getattr(a, "k_norm", None)),
        )

    def ffn(self, layer: int) -> FfnWeights:
        if self.stream is not None:
            self.stream.present(layer)
        return self._ffn(layer)

    def _ffn(self, layer: int) -> FfnWeights:
        m = self.decoder.layers[layer].mlp
        return FfnWeights(
            m.gate_proj.weight.detach(),
            m.up_proj.weight.detach(),
            m.down_proj.weight.detach(),
            _bias(m.gate_proj),
            _bias(m.up_proj),
            _bias(m.down_proj),
        )

    # -- the order of the channels -----------------------------------------------------------------------------------
    def channel_order(self, layer: int) -> Tensor | None:
        """(F,): the checkpoint's channel at each place of the layer's FFN; None while they are in the checkpoint's order.

        It is a buffer of the FFN's module, so that it stays with the weights, whoever describes the model next.
        """
        return getattr(self.decoder.layers[layer].mlp, "channel_order", None)

    def order_channels(self, layer: int, order: Tensor | None) -> None:
        """Put the layer's FFN channels, in place, into the order of the checkpoint's channels ``order`` (F,); None restores the
        checkpoint's own. The layer goes on computing the same function."""
        current = self.channel_order(layer)
        if current is order:
            return
        if current is None or order is None or not torch.equal(current, order):
            if self.stream is not None:
                self.stream.drop(layer)  # its matrices come in the new order next time; only biases are here
            target = torch.arange(self.channels, device=self.device) if order is None else order
            places = target if current is None else torch.argsort(current)[target]
            own = self._ffn(layer)
            axes = ((own.gate, 0), (own.up, 0), (own.down, 1), (own.gate_bias, 0), (own.up_bias, 0))
            here = [(tensor, axis) for tensor, axis in axes if tensor is not None and not tensor.is_meta]
            # All of it first: where memory ends here, the layer is still as it was.
            new = [tensor.index_select(axis, places) for tensor, axis in here]
            for (tensor, _), moved in zip(here, new, strict=True):
                tensor.copy_(moved)
        self.decoder.layers[layer].mlp.register_buffer("channel_order", order, persistent=False)

    def checkpoint_ffn(self, layer: int) -> FfnWeights:
        """The layer's FFN with its channels in the checkpoint's order: the model's own weights, or a copy where they moved."""
        order = self.channel_order(layer)
        return self.ffn(layer) if order is None else self.ffn(layer).in_order(torch.argsort(order))

    def restore_order(self) -> None:
        """Put the channels of every layer back into the checkpoint's order."""
        for layer in range(self.layers):
            self.order_channels(layer, None)

    def has_bias(self, layer: int, place: str) -> bool:
        """Whether the linear map at ``place`` (``mlp.down_proj``) of a layer has a bias."""
        return self.decoder.layers[layer].get_submodule(place).bias is not None

    def window(self, layer: int) -> int | None:
        """Sliding-window length of the layer's attention, None for full causal attention."""
        types = getattr(self.config, "layer_types", None)
        if types is not None and types[layer] != "sliding_attention":
            return None
        size = getattr(self.config, "sliding_window", None)
        if size is None or (types is None and not getattr(self.config, "use_sliding_window", True)):
            return None
        return int(size)

    # -- counting ----------------------------------------------------------------------------------------------------
    def model_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def decoder_parameters(self) -> int:
        """Parameters of the decoder layers: attention, FFN and their norms; no embeddings, no final norm, no head."""
        return sum(p.numel() for p in self.decoder.layers.parameters())

    def attention_cost(self, kv_groups: int, heads_per_group: int) -> int:
        """Parameters of an attention block of this shape with its norms; 0 for a block that is dropped."""
        a = self.attention(0)
        heads, h, d = kv_groups * heads_per_group, self.head_dim, self.hidden
        if heads == 0:
            return 0
        biases = sum(n for b, n in ((a.q_bias, heads * h), (a.k_bias, kv_groups * h), (a.v_bias, kv_groups * h)) if b is not None)
        norms = d + sum(h for norm in (a.q_norm, a.k_norm) if norm is not None)
        return 2 * heads * h * d + 2 * kv_groups * h * d + biases + norms + (0 if a.o_bias is None else d)

    def ffn_cost(self, channels: int) -> int:
        """Parameters of an FFN of this width with its norm; 0 for a block that is dropped."""
        m, d = self.ffn(0), self.hidden
        biases = sum(channels for b in (m.gate_bias, m.up_bias) if b is not None)
        return 0 if channels == 0 else 3 * channels * d + biases + d + (0 if m.down_bias is None else d)

    # -- computing ---------------------------------------------------------------------------------------------------
    def embed(self, tokens: Tensor) -> Tensor:
        """(B, S) token ids to the float32 residual stream (B, S, d)."""
        return self.decoder.embed_tokens(tokens).float()  # type: ignore[no-any-return]

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (S, h) for positions 0..S-1, by the model's own rotary module (any scaling it has)."""
        positions = torch.arange(length, device=self.device)[None]
        probe = torch.zeros(1, length, self.hidden, dtype=torch.float32, device=self.device)
        cos, sin = self.decoder.rotary_emb(probe, positions)
        return cos[0], sin[0]

    def final_norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.decoder.norm.weight.detach(), self.eps)

    def logits(self, x: Tensor) -> Tensor:
        """The head's product with final hidden states x (..., d), after the norm, in the weights' dtype: (..., V)."""
        logits: Tensor = self.model.lm_head(x.to(self.dtype))
        return logits

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
        """(V, d). Of a streamed model only where the whole matrix is held; :meth:`logits` always works."""
        weight: Tensor = self.model.lm_head.weight
        return weight.detach()

    def attention_norm(self, layer: int, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What q, k and v see: residual x (B, S, d), normalised, in ``dtype`` (x's own)."""
        return rms_norm(x, self.decoder.layers[layer].input_layernorm.weight.detach(), self.eps, dtype)

    def ffn_norm(self, layer: int, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What gate and up see: residual x (B, S, d), normalised, in ``dtype`` (x's own)."""
        return rms_norm(x, self.decoder.layers[layer].post_attention_layernorm.weight.detach(), self.eps, dtype)

    def attention_inputs(self, layer: int, x: Tensor, w: AttentionWeights, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What o_proj sees: residual x (B, S, d) to head outputs (B, S, K*r*h) in the weights' dtype."""
        batch, length, _ = x.shape
        n = self.attention_norm(layer, x, w.q.dtype)
        q = F.linear(n, w.q, w.q_bias).view(batch, length, -1, w.head_dim)
        k = F.linear(n, w.k, w.k_bias).view(batch, length, -1, w.head_dim)
        v = F.linear(n, w.v, w.v_bias).view(batch, length, -1, w.head_dim).transpose(1, 2)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, self.eps), rms_norm(k, w.k_norm, self.eps)
        q, k = rotate(q, rope).to(v.dtype).transpose(1, 2), rotate(k, rope).to(v.dtype).transpose(1, 2)
        window = self.window(layer)
        mask = None
        if window is not None and length > window:
            i = torch.arange(length, device=x.device)
            mask = (i[:, None] >= i) & (i[:, None] - i < window)
        if mask is None and x.device.type == "cpu" and QUERIES < length < LONG:
            return _causal_in_blocks(q, k, v, self.softmax_scale).reshape(batch, length, -1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=w.heads_per_group > 1
        )
        return out.transpose(1, 2).reshape(batch, length, -1)

    @property
    def softmax_scale(self) -> float:
        return float(self.head_dim**-0.5)

    def ffn_inputs(self, layer: int, x: Tensor, w: FfnWeights) -> Tensor:
        """What down_proj sees: residual x (B, S, d) to gated channels (B, S, F) in the weights' dtype."""
        n = self.ffn_norm(layer, x, w.gate.dtype)
        gate, up = self.activation(F.linear(n, w.gate, w.gate_bias)), F.linear(n, w.up, w.up_bias)
        return gate * up if torch.is_grad_enabled() else gate.mul_(up)

    def attention_update(self, layer: int, x: Tensor, w: AttentionWeights, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What the attention block adds to the residual x (B, S, d), in the weights' dtype."""
        return F.linear(self.attention_inputs(layer, x, w, rope), w.o, w.o_bias)

    def ffn_update(self, layer: int, x: Tensor, w: FfnWeights) -> Tensor:
        """What the FFN block adds to the residual x (B, S, d), in the weights' dtype."""
        return F.linear(self.ffn_inputs(layer, x, w), w.down, w.down_bias)

    def attend(self, layer: int, x: Tensor, w: AttentionWeights | None, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The residual stream after the attention block; None is a block that was dropped."""
        return x if w is None else x + self.attention_update(layer, x, w, rope)

    def feed_forward(self, layer: int, x: Tensor, w: FfnWeights | None) -> Tensor:
        """The residual stream after the FFN block; None is a block that was dropped."""
        return x if w is None else x + self.ffn_update(layer, x, w)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 and returned in ``dtype`` (x's own)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    if torch.is_grad_enabled():  # the backward pass needs what would be overwritten
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
    else:
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight).to(dtype or x.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of x (B, S, heads, h), half-split convention, in float32."""
    cos, sin = (table[:, None] for table in rope)
    half = x.shape[-1] // 2
    # rotate_half(x) * sin with the sign on the sines: one pass over x less.
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    y = x.float()
    return (y * cos).addcmul_(y.roll(half, -1), signed)


def _causal_in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of q (B, K*r, S, h) on k and v (B, K, S, h), as (B, S, K*r, h).

    On short sequences torch's kernel for CPUs computes what the mask hides, and reads the keys once per query head. With QUERIES
    positions at a time only the keys before them are there, and the heads of a group are rows of one product: 20 to 36 % less
    time at 256 and 512 positions.
    """
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    grouped = q.unflatten(1, (groups, heads // groups))
    out = q.new_empty(batch, length, groups, heads // groups, width)
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        rows = grouped[:, :, :, start:stop].flatten(2, 3)
        hidden = q.new_full((stop - start, stop), -torch.inf).triu_(start + 1).repeat(heads // groups, 1)
        part = F.scaled_dot_product_attention(rows, k[:, :, :stop], v[:, :, :stop], attn_mask=hidden, scale=scale)
        out[:, start:stop] = part.unflatten(2, (-1, stop - start)).permute(0, 3, 1, 2, 4)
    return out.flatten(2, 3)


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _weight(module: Any) -> Tensor | None:
    return None if module is None else module.weight.detach()
