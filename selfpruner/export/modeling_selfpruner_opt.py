"""OPT whose layers differ in width, after structured pruning, for transformers >= 5.23.

This file travels inside the checkpoint and needs nothing but torch, transformers and huggingface_hub. The config is OPT's, with
``per_layer_config`` naming what a layer has less of: ``num_attention_heads``, ``ffn_dim``; 0 means that the layer has no attention,
or no FFN, and no norm before it. Tensor names are OPT's.

    base_model_type   the family the model was made from; informative
    head_dim          width of a head, as hidden_size / heads no longer says it
    enable_bias       biases on q_proj, k_proj, v_proj and fc1
    o_proj_bias       bias on out_proj; may differ by layer
    down_proj_bias    bias on fc2; may differ by layer
"""

# The classes below take the place of the family's own, which are annotated with the family's own config.
# mypy: disable-error-code="arg-type,assignment,no-any-return,no-untyped-call,operator"

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import (
    OPTAttention,
    OPTDecoder,
    OPTForCausalLM,
    OPTLearnedPositionalEmbedding,
    OPTModel,
    OPTPreTrainedModel,
)


@strict
class SelfPrunerOPTConfig(OPTConfig):
    """OPT's config with per-layer widths and the switches above."""

    model_type = "selfpruner_opt"

    base_model_type: str = "opt"
    head_dim: int = 64
    o_proj_bias: bool = True
    down_proj_bias: bool = True


class SelfPrunerOPTAttention(OPTAttention):
    """Attention with the heads and biases of ``layer``, its own config; ``config`` is the model's."""

    def __init__(self, config: SelfPrunerOPTConfig, layer: SelfPrunerOPTConfig, layer_idx: int) -> None:
        # Past OPTAttention's constructor, which takes the heads for a part of the hidden size; its forward is used as it is.
        super(OPTAttention, self).__init__()
        # The model's config carries the attention implementation, also when it is switched later.
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = layer.num_attention_heads
        self.head_dim = layer.head_dim
        self.dropout = layer.attention_dropout
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width = self.num_heads * self.head_dim
        self.k_proj = nn.Linear(layer.hidden_size, width, bias=layer.enable_bias)
        self.v_proj = nn.Linear(layer.hidden_size, width, bias=layer.enable_bias)
        self.q_proj = nn.Linear(layer.hidden_size, width, bias=layer.enable_bias)
        self.out_proj = nn.Linear(width, layer.hidden_size, bias=layer.o_proj_bias)


class SelfPrunerOPTDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SelfPrunerOPTConfig, layer_idx: int) -> None:
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.layer_idx = layer_idx
        self.dropout = nn.Dropout(layer.dropout)
        self.has_attention = layer.num_attention_heads > 0
        self.has_ffn = layer.ffn_dim > 0
        if self.has_attention:
            self.self_attn = SelfPrunerOPTAttention(config, layer, layer_idx)
            self.self_attn_layer_norm = nn.LayerNorm(layer.hidden_size)
        if self.has_ffn:
            self.fc1 = nn.Linear(layer.hidden_size, layer.ffn_dim, bias=layer.enable_bias)
            self.fc2 = nn.Linear(layer.ffn_dim, layer.hidden_size, bias=layer.down_proj_bias)
            self.final_layer_norm = nn.LayerNorm(layer.hidden_size)
            self.activation_fn = ACT2FN[layer.activation_function]

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if self.has_attention:
            attended, _ = self.self_attn(
                hidden_states=self.self_attn_layer_norm(hidden_states),
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = hidden_states + self.dropout(attended)
        elif past_key_values is not None:
            # The cache and the masks take their length from the first layer, whichever that is: one number per token marks it.
            # A static cache has sized its layers already, this one for zero heads.
            layers = past_key_values.layers
            held = layers[self.layer_idx].keys if self.layer_idx < len(layers) else None
            heads, width = (1, 1) if held is None else (held.shape[1], held.shape[-1])
            batch, length, _ = hidden_states.shape
            mark = hidden_states.new_zeros(batch, heads, length, width)
            past_key_values.update(mark, mark, self.layer_idx)
        if self.has_ffn:
            channels = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
            hidden_states = hidden_states + self.dropout(self.fc2(channels))
        return hidden_states


class SelfPrunerOPTPreTrainedModel(OPTPreTrainedModel):
    config: SelfPrunerOPTConfig
    config_class = SelfPrunerOPTConfig
    _no_split_modules = ["SelfPrunerOPTDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": SelfPrunerOPTDecoderLayer, "attentions": SelfPrunerOPTAttention}  # noqa: RUF012


class SelfPrunerOPTDecoder(SelfPrunerOPTPreTrainedModel, OPTDecoder):
    def __init__(self, config: SelfPrunerOPTConfig) -> None:
        # Past OPTDecoder's constructor, which would build layers of one width; its forward is used as it is.
        super(OPTDecoder, self).__init__(config)
        self.layerdrop = config.layerdrop
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embed_positions = OPTLearnedPositionalEmbedding(config.max_position_embeddings, config.hidden_size)
        self.project_in = self.project_out = None
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList([SelfPrunerOPTDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()


class SelfPrunerOPTModel(SelfPrunerOPTPreTrainedModel, OPTModel):
    def __init__(self, config: SelfPrunerOPTConfig) -> None:
        super(OPTModel, self).__init__(config)
        self.decoder = SelfPrunerOPTDecoder(config)
        self.post_init()


class SelfPrunerOPTForCausalLM(SelfPrunerOPTPreTrainedModel, OPTForCausalLM):
    def __init__(self, config: SelfPrunerOPTConfig) -> None:
        super(OPTForCausalLM, self).__init__(config)
        self.model = SelfPrunerOPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["SelfPrunerOPTConfig", "SelfPrunerOPTForCausalLM", "SelfPrunerOPTModel"]
