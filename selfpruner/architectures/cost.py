"""What a model and its blocks cost, in parameters."""

from __future__ import annotations

from selfpruner.architectures.base import Architecture


def model_parameters(arch: Architecture) -> int:
    """All parameters, tied ones once."""
    return sum(p.numel() for p in arch.model.parameters())


def decoder_parameters(arch: Architecture) -> int:
    """Parameters of the decoder layers: attention, FFN and their norms; no embeddings, no final norm, no head."""
    return sum(p.numel() for p in arch.decoder.layers.parameters())


def attention_cost(arch: Architecture, kv_groups: int, heads_per_group: int) -> int:
    """Parameters of an attention block of this shape with its norms; 0 for a block that is dropped."""
    a = arch.attention(0)
    heads, h, d = kv_groups * heads_per_group, arch.head_dim, arch.hidden
    if heads == 0:
        return 0
    biases = sum(n for b, n in ((a.q_bias, heads * h), (a.k_bias, kv_groups * h), (a.v_bias, kv_groups * h)) if b is not None)
    norms = _norms(arch, arch.layout.attention_norms) + sum(h for norm in (a.q_norm, a.k_norm) if norm is not None)
    return 2 * heads * h * d + 2 * kv_groups * h * d + biases + norms + (0 if a.o_bias is None else d)


def ffn_cost(arch: Architecture, channels: int) -> int:
    """Parameters of an FFN of this width with its norms; 0 for a block that is dropped."""
    m, d = arch.ffn(0), arch.hidden
    biases = sum(channels for b in (m.gate_bias, m.up_bias) if b is not None) + (0 if m.down_bias is None else d)
    return 0 if channels == 0 else len(m.matrices) * channels * d + biases + _norms(arch, arch.layout.ffn_norms)


def _norms(arch: Architecture, places: tuple[str, ...]) -> int:
    """Parameters of the norms that go with a block."""
    return sum(p.numel() for place in places for p in arch.decoder.layers[0].get_submodule(place).parameters())
