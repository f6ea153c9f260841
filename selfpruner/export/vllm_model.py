"""Pruned models in vLLM's own layers, built from each layer's own config: what the modeling files of Llama and its relatives, of
Phi-3 and of the Gemmas can say, dropped blocks, biases by layer, norms on q and k, sliding windows and soft caps.

Loaded by vLLM through :mod:`selfpruner.export.vllm_plugin`; needs vLLM 0.32 or later, the first that was tried. OPT is in
:mod:`selfpruner.export.vllm_opt`.
"""

# vLLM is not installed where types are checked.
# mypy: disable-error-code="misc,no-any-return"

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.gemma2 import Gemma2Attention
from vllm.model_executor.models.gemma3 import Gemma3Attention
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index

from selfpruner.export.vllm_plugin import activation, check

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class SelfPrunerAttention(LlamaAttention):
    """Attention with the head counts, norms and biases of ``layer``, its own config."""

    def __init__(self, layer: PreTrainedConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            config=layer,
            hidden_size=layer.hidden_size,
            num_heads=layer.num_attention_heads,
            num_kv_heads=layer.num_key_value_heads,
            max_position_embeddings=layer.max_position_embeddings,
            quant_config=vllm_config.quant_config,
            bias=getattr(layer, "attention_bias", False),  # Phi-3 has none, nor norms
            bias_o_proj=layer.o_proj_bias,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        self.qk_norm = getattr(layer, "qk_norm", False)
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
    def __init__(self, layer: PreTrainedConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        width, quantization, bias = layer.intermediate_size, vllm_config.quant_config, getattr(layer, "mlp_bias", False)
        self.gate_up_proj = MergedColumnParallelLinear(
            layer.hidden_size, [width] * 2, bias=bias, quant_config=quantization, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width, layer.hidden_size, bias=layer.down_proj_bias, quant_config=quantization, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = get_act_and_mul_fn(activation(layer))

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


class SelfPrunerPhi3ForCausalLM(SelfPrunerForCausalLM):
    """Phi-3 is a Llama whose matrices are stored as vLLM holds them."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {name: [name] for name in ("qkv_proj", "gate_up_proj")}


# -- Gemma -------------------------------------------------------------------------------------------------------------
class _GemmaDecoderLayer(nn.Module):
    """A norm before and after each block; a block that is gone takes both along."""

    attention_class: ClassVar[type[nn.Module]]

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        layer = vllm_config.model_config.hf_config.per_layer_config[extract_layer_index(prefix)]
        self.has_attention = layer.num_attention_heads > 0
        self.has_mlp = layer.intermediate_size > 0
        size, eps = layer.hidden_size, layer.rms_norm_eps
        if self.has_attention:
            self.self_attn = self.attention_class(
                config=layer,
                hidden_size=size,
                num_heads=layer.num_attention_heads,
                num_kv_heads=layer.num_key_value_heads,
                head_dim=layer.head_dim,
                max_position_embeddings=layer.max_position_embeddings,
                cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config,
                attn_logits_soft_cap=getattr(layer, "attn_logit_softcapping", None),
                prefix=f"{prefix}.self_attn",
            )
            if layer.o_proj_bias != layer.attention_bias:
                self.self_attn.o_proj = RowParallelLinear(
                    layer.num_attention_heads * layer.head_dim,
                    size,
                    bias=layer.o_proj_bias,
                    quant_config=vllm_config.quant_config,
                    prefix=f"{prefix}.self_attn.o_proj",
                )
            self.input_layernorm = GemmaRMSNorm(size, eps=eps)
            self.post_attention_layernorm = GemmaRMSNorm(size, eps=eps)
        if self.has_mlp:
            self.mlp = SelfPrunerMLP(layer, vllm_config, f"{prefix}.mlp")
            self.pre_feedforward_layernorm = GemmaRMSNorm(size, eps=eps)
            self.post_feedforward_layernorm = GemmaRMSNorm(size, eps=eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`SelfPrunerDecoderLayer.forward`."""
        if residual is None:
            residual, hidden_states = hidden_states, torch.zeros_like(hidden_states)
        if self.has_attention:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
            hidden_states = self.post_attention_layernorm(self.self_attn(positions=positions, hidden_states=hidden_states))
        if self.has_mlp:
            hidden_states, residual = self.pre_feedforward_layernorm(hidden_states, residual)
            hidden_states = self.post_feedforward_layernorm(self.mlp(hidden_states))
        return hidden_states, residual


class SelfPrunerGemma2DecoderLayer(_GemmaDecoderLayer):
    attention_class = Gemma2Attention


class SelfPrunerGemma3DecoderLayer(_GemmaDecoderLayer):
    attention_class = Gemma3Attention


class SelfPrunerGemmaModel(LlamaModel):
    """Llama's, with embeddings scaled by the root of their width and Gemma's norm at the end."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module]) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.norm = GemmaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        # A buffer, so that it is rounded to the model's dtype as transformers rounds it.
        self.register_buffer("normalizer", torch.tensor(self.config.hidden_size**0.5), persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids) * self.normalizer


class _GemmaForCausalLM(LlamaForCausalLM):
    layer_class: ClassVar[type[nn.Module]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check(config, vllm_config.parallel_config.tensor_parallel_size)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer_class)
        self.logits_processor = LogitsProcessor(config.vocab_size, soft_cap=config.final_logit_softcapping)

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] | None = None) -> nn.Module:
        return SelfPrunerGemmaModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type or self.layer_class)


class SelfPrunerGemma2ForCausalLM(_GemmaForCausalLM):
    layer_class = SelfPrunerGemma2DecoderLayer


class SelfPrunerGemma3ForCausalLM(_GemmaForCausalLM):
    layer_class = SelfPrunerGemma3DecoderLayer
