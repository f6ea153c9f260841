"""The pruned model in vLLM's own layers: Llama's classes, built from each layer's own config, with what the other families add.

Loaded by vLLM through :mod:`selfpruner.export.vllm_plugin`; needs vLLM 0.32 or later, the first that was tried. Everything that
:mod:`selfpruner.export.modeling_selfpruner` can say is here: dropped blocks, biases by layer, q and k norms, sliding windows.
"""

# vLLM is not installed where types are checked.
# mypy: disable-error-code="misc,no-any-return"

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from selfpruner.export.vllm_plugin import check


class SelfPrunerAttention(LlamaAttention):
    """Attention with the head counts, norms and biases of ``layer``, its own config."""

    def __init__(self, layer: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            config=layer,
            hidden_size=layer.hidden_size,
            num_heads=layer.num_attention_heads,
            num_kv_heads=layer.num_key_value_heads,
            max_position_embeddings=layer.max_position_embeddings,
            quant_config=vllm_config.quant_config,
            bias=layer.attention_bias,
            bias_o_proj=layer.o_proj_bias,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        self.qk_norm = layer.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=layer.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=layer.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.qk_norm:
            return super().forward(positions, hidden_states)
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class SelfPrunerMLP(nn.Module):
    def __init__(self, layer: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        width, quantization = layer.intermediate_size, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            layer.hidden_size, [width] * 2, bias=layer.mlp_bias, quant_config=quantization, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width, layer.hidden_size, bias=layer.down_proj_bias, quant_config=quantization, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = get_act_and_mul_fn(layer.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class SelfPrunerDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        layer = vllm_config.model_config.hf_config.per_layer_config[extract_layer_index(prefix)]
        self.has_attention = layer.num_attention_heads > 0
        self.has_mlp = layer.intermediate_size > 0
        if self.has_attention:
            self.self_attn = SelfPrunerAttention(layer, vllm_config, f"{prefix}.self_attn")
            self.input_layernorm = RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        if self.has_mlp:
            self.mlp = SelfPrunerMLP(layer, vllm_config, f"{prefix}.mlp")
            self.post_attention_layernorm = RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden_states`` is what the last block added; the norms add it to ``residual``, the sum of all before it."""
        if residual is None:
            residual, hidden_states = hidden_states, torch.zeros_like(hidden_states)
        if self.has_attention:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
            hidden_states = self.self_attn(positions, hidden_states)
        if self.has_mlp:
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class SelfPrunerForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SelfPrunerDecoderLayer)
