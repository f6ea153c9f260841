"""Pruned OPT in vLLM's own layers, built from each layer's own config: what the modeling file of OPT can say.

Loaded by vLLM through :mod:`selfpruner.export.vllm_plugin`; see :mod:`selfpruner.export.vllm_model`.
"""

# vLLM is not installed where types are checked.
# mypy: disable-error-code="misc,no-any-return"

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.opt import OPTDecoder, OPTForCausalLM, OPTModel
from vllm.model_executor.models.utils import (
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)

from selfpruner.export.vllm_plugin import check

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class SelfPrunerOPTAttention(nn.Module):
    """Attention with the heads and biases of ``layer``, its own config."""

    def __init__(self, layer: PreTrainedConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        heads, width, quantization = layer.num_attention_heads, layer.head_dim, vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            layer.hidden_size, width, heads, bias=layer.enable_bias, quant_config=quantization, prefix=f"{prefix}.qkv_proj"
        )
        self.out_proj = RowParallelLinear(
            heads * width, layer.hidden_size, bias=layer.o_proj_bias, quant_config=quantization, prefix=f"{prefix}.out_proj"
        )
        self.attn = Attention(
            heads // vllm_config.parallel_config.tensor_parallel_size,
            width,
            scale=width**-0.5,
            cache_config=vllm_config.cache_config,
            quant_config=quantization,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        output, _ = self.out_proj(self.attn(*qkv.chunk(3, dim=-1)))
        return output


class SelfPrunerOPTDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        layer = vllm_config.model_config.hf_config.per_layer_config[extract_layer_index(prefix)]
        self.has_attention = layer.num_attention_heads > 0
        self.has_ffn = layer.ffn_dim > 0
        size, quantization = layer.hidden_size, vllm_config.quant_config
        if self.has_attention:
            self.self_attn = SelfPrunerOPTAttention(layer, vllm_config, f"{prefix}.self_attn")
            self.self_attn_layer_norm = nn.LayerNorm(size)
        if self.has_ffn:
            self.fc1 = ColumnParallelLinear(
                size, layer.ffn_dim, bias=layer.enable_bias, quant_config=quantization, prefix=f"{prefix}.fc1"
            )
            self.fc2 = RowParallelLinear(
                layer.ffn_dim, size, bias=layer.down_proj_bias, quant_config=quantization, prefix=f"{prefix}.fc2"
            )
            self.final_layer_norm = nn.LayerNorm(size)
            self.activation_fn = get_act_fn(layer.activation_function)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.has_attention:
            hidden_states = hidden_states + self.self_attn(self.self_attn_layer_norm(hidden_states))
        if self.has_ffn:
            channels, _ = self.fc1(self.final_layer_norm(hidden_states))
            output, _ = self.fc2(self.activation_fn(channels))
            hidden_states = hidden_states + output
        return hidden_states


class SelfPrunerOPTDecoder(OPTDecoder):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config = vllm_config.model_config.hf_config
        # OPT's constructor would build layers of one width, whose attention vLLM would count.
        without_layers = copy.copy(config)
        without_layers.num_hidden_layers = 0
        super().__init__(without_layers, vllm_config.cache_config, vllm_config.quant_config, prefix)
        self.config = config
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: SelfPrunerOPTDecoderLayer(vllm_config, prefix=prefix),
            prefix=f"{prefix}.layers",
        )


@support_torch_compile(dynamic_arg_dims=dict.fromkeys(("input_ids", "positions", "intermediate_tensors", "inputs_embeds"), 0))
class SelfPrunerOPTModel(OPTModel):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        self.decoder = SelfPrunerOPTDecoder(vllm_config, f"{prefix}.decoder")
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], self.decoder.config.hidden_size
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> object:
        return self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)


class SelfPrunerOPTForCausalLM(OPTForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        check(config, vllm_config.parallel_config.tensor_parallel_size)
        self.config, self.quant_config = config, vllm_config.quant_config
        self.model = SelfPrunerOPTModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.decoder.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
