"""OPT whose layers differ in width, after structured pruning, for transformers >= 5.15.

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

import transformers

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 15):
    raise ImportError(
        "The layers of this checkpoint differ in width, which takes transformers 5.15 or later; this is "
        f"{transformers.__version__}. Run: pip install --upgrade 'transformers>=5.15'"
    )

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
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


def _foreign_cache(index: int) -> ValueError:
    return ValueError(
        f"The cache was not filled by this model: for layer {index} it has another number of KV heads. They differ by layer, see "
        "config.per_layer_config. Prefix tuning, whose prefixes are alike in all layers, does not fit; use LoRA or prompt tuning."
    )


def _check_cache(past_key_values: Cache, index: int, heads: int) -> None:
    layers = past_key_values.layers
    held = getattr(layers[index], "keys", None) if index < len(layers) else None
    # A quantized cache has a form of its own. Several processes have a part of the heads each.
    if held is None or held.ndim < 4 or held.shape[1] == heads:
        return
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise _foreign_cache(index)


class SelfPrunerOPTDropped(nn.Module):
    """Stands where an attention was dropped: it keeps the length of the cache, and gives None for attention weights. (transformers
    looks for classes of this kind with "Attention" in their name, and would then let nobody choose how attention is computed.)"""

    def __init__(self, config: SelfPrunerOPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, past_key_values: Cache | None = None) -> tuple[None, None] | None:
        if past_key_values is not None:
            # The cache and the masks take their length from the first layer, whichever that is: one number per token marks it, or
            # as many as a quantized cache takes at once. A static cache has sized its layers already, this one for zero heads.
            layers = past_key_values.layers
            layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
            held = getattr(layer, "keys", None)
            heads, width = 1, getattr(layer, "q_group_size", 1)
            if held is not None and held.ndim == 4:
                heads, width = held.shape[1], held.shape[-1]
                if heads == 0 and not getattr(layer, "is_compileable", False):
                    raise _foreign_cache(self.layer_idx)
            batch, length, _ = hidden_states.shape
            mark = hidden_states.new_zeros(batch, heads, length, width)
            past_key_values.update(mark, mark, self.layer_idx)
        # Outputs are collected from modules: other than eager attentions give no weights, so none is missing here.
        return None if self.config._attn_implementation == "eager" else (None, None)


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
        self.kv_heads = layer.num_attention_heads
        self.has_ffn = layer.ffn_dim > 0
        if self.has_attention:
            self.self_attn = SelfPrunerOPTAttention(config, layer, layer_idx)
            self.self_attn_layer_norm = nn.LayerNorm(layer.hidden_size)
        else:
            self.no_attn = SelfPrunerOPTDropped(config, layer_idx)
        if self.has_ffn:
            self.fc1 = nn.Linear(layer.hidden_size, layer.ffn_dim, bias=layer.enable_bias)
            self.fc2 = nn.Linear(layer.ffn_dim, layer.hidden_size, bias=layer.down_proj_bias)
            self.final_layer_norm = nn.LayerNorm(layer.hidden_size)
            self.activation_fn = ACT2FN[layer.activation_function]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if self.has_attention:
            if past_key_values is not None:
                _check_cache(past_key_values, self.layer_idx, self.kv_heads)
            attended, _ = self.self_attn(
                hidden_states=self.self_attn_layer_norm(hidden_states),
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = hidden_states + self.dropout(attended)
        else:
            self.no_attn(hidden_states, past_key_values)
        if self.has_ffn:
            channels = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
            hidden_states = hidden_states + self.dropout(self.fc2(channels))
        return hidden_states


class SelfPrunerOPTPreTrainedModel(OPTPreTrainedModel):
    config: SelfPrunerOPTConfig
    config_class = SelfPrunerOPTConfig
    _no_split_modules = ["SelfPrunerOPTDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SelfPrunerOPTDecoderLayer,
        "attentions": [SelfPrunerOPTAttention, SelfPrunerOPTDropped],
    }


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


class SelfPrunerOPTForSequenceClassification(GenericForSequenceClassification, SelfPrunerOPTPreTrainedModel):
    def __init__(self, config: SelfPrunerOPTConfig) -> None:
        # Past the generic constructor, which asks AutoModel, for the model of this file.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerOPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class SelfPrunerOPTForTokenClassification(GenericForTokenClassification, SelfPrunerOPTPreTrainedModel):
    def __init__(self, config: SelfPrunerOPTConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerOPTModel(config)
        self.dropout = nn.Dropout(0.1 if (rate := getattr(config, "classifier_dropout", None)) is None else rate)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "SelfPrunerOPTConfig",
    "SelfPrunerOPTForCausalLM",
    "SelfPrunerOPTForSequenceClassification",
    "SelfPrunerOPTForTokenClassification",
    "SelfPrunerOPTModel",
]
