"""Phi-3 whose layers differ in width, after structured pruning, for transformers >= 5.15.

This file travels inside the checkpoint and needs nothing but torch, transformers and huggingface_hub. The config and the names of
tensors are Phi-3's; ``per_layer_config`` names what a layer has less of: ``num_attention_heads``, ``num_key_value_heads``,
``intermediate_size``; 0 means that the layer has no attention, or no FFN, and no norm before it. ``qkv_proj`` has the rows of the
layer's own queries, keys and values, ``gate_up_proj`` those of its gates and channels.

    base_model_type   the family the model was made from; informative
    head_dim          width of a head, as hidden_size / heads no longer says it
    o_proj_bias       bias on o_proj; may differ by layer
    down_proj_bias    bias on down_proj; may differ by layer
"""

# The classes below take the place of the family's own, which are annotated with the family's own config.
# mypy: disable-error-code="arg-type,assignment,no-any-return,no-untyped-call,operator"

import transformers

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 15):
    raise ImportError(
        "The layers of this checkpoint differ in width, which takes transformers 5.15 or later; this is "
        f"{transformers.__version__}. Run: pip install --upgrade 'transformers>=5.15'"
    )

import copy

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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import (
    Phi3ForCausalLM,
    Phi3Model,
    Phi3PreTrainedModel,
    Phi3RMSNorm,
    Phi3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


@strict
class SelfPrunerPhi3Config(Phi3Config):
    """Phi-3's config with per-layer widths and the switches above."""

    model_type = "selfpruner_phi3"

    base_model_type: str = "phi3"
    head_dim: int = 96
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_rope(self) -> None:
        """As many factors as the rotary table has columns. Phi-3's own check divides the hidden size by the heads, which differ."""
        rope = self.rope_parameters or {}
        half = int(self.head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        for name, factors in (("short_factor", rope.get("short_factor")), ("long_factor", rope.get("long_factor"))):
            if factors is not None and len(factors) != half:
                raise ValueError(f"rope_parameters: {name} must have {half} numbers, not {len(factors)}")

    def validate_architecture(self) -> None:
        """Query heads must divide by the KV heads."""
        for index, layer in enumerate(self.per_layer_config):
            heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
            if (heads == 0) != (kv_heads == 0) or (kv_heads and heads % kv_heads):
                raise ValueError(f"layer {index}: {heads} query heads do not divide into {kv_heads} KV heads")


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


class SelfPrunerPhi3Dropped(nn.Module):
    """Stands where an attention was dropped: it keeps the length of the cache, and gives None for attention weights. (transformers
    looks for classes of this kind with "Attention" in their name, and would then let nobody choose how attention is computed.)"""

    def __init__(self, config: SelfPrunerPhi3Config, layer_idx: int) -> None:
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


class SelfPrunerPhi3Attention(nn.Module):
    """Attention with the head counts and the bias of ``layer``, its own config; ``config`` is the model's."""

    def __init__(self, config: SelfPrunerPhi3Config, layer: SelfPrunerPhi3Config, layer_idx: int) -> None:
        super().__init__()
        # The model's config carries the attention implementation, also when it is switched later.
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = layer.head_dim
        self.num_key_value_groups = layer.num_attention_heads // layer.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = layer.attention_dropout
        self.is_causal = True
        queries, keys = layer.num_attention_heads * self.head_dim, layer.num_key_value_heads * self.head_dim
        self.rows = [queries, keys, keys]
        self.qkv_proj = nn.Linear(layer.hidden_size, sum(self.rows), bias=False)
        self.o_proj = nn.Linear(queries, layer.hidden_size, bias=layer.o_proj_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = self.qkv_proj(hidden_states).split(self.rows, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        window = self.config.sliding_window
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, sliding_window=window, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class SelfPrunerPhi3MLP(nn.Module):
    def __init__(self, layer: SelfPrunerPhi3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(layer.hidden_size, 2 * layer.intermediate_size, bias=False)
        self.down_proj = nn.Linear(layer.intermediate_size, layer.hidden_size, bias=layer.down_proj_bias)
        self.activation_fn = ACT2FN[layer.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.activation_fn(gate) * up)


class SelfPrunerPhi3DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SelfPrunerPhi3Config, layer_idx: int) -> None:
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.layer_idx = layer_idx
        self.dropout = nn.Dropout(layer.resid_pdrop)
        self.has_attention = layer.num_attention_heads > 0
        self.kv_heads = layer.num_key_value_heads
        self.has_mlp = layer.intermediate_size > 0
        if self.has_attention:
            self.self_attn = SelfPrunerPhi3Attention(config, layer, layer_idx)
            self.input_layernorm = Phi3RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        else:
            self.no_attn = SelfPrunerPhi3Dropped(config, layer_idx)
        if self.has_mlp:
            self.mlp = SelfPrunerPhi3MLP(layer)
            self.post_attention_layernorm = Phi3RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if self.has_attention:
            if past_key_values is not None:
                _check_cache(past_key_values, self.layer_idx, self.kv_heads)
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = hidden_states + self.dropout(attended)
        else:
            self.no_attn(hidden_states, past_key_values)
        if self.has_mlp:
            hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return hidden_states


class SelfPrunerPhi3PreTrainedModel(Phi3PreTrainedModel):
    config: SelfPrunerPhi3Config
    config_class = SelfPrunerPhi3Config
    _no_split_modules = ["SelfPrunerPhi3DecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SelfPrunerPhi3DecoderLayer,
        "attentions": [SelfPrunerPhi3Attention, SelfPrunerPhi3Dropped],
    }


class SelfPrunerPhi3Model(SelfPrunerPhi3PreTrainedModel, Phi3Model):
    def __init__(self, config: SelfPrunerPhi3Config) -> None:
        # Past Phi3Model's constructor, which would build layers of one width; its forward is used as it is.
        super(Phi3Model, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([SelfPrunerPhi3DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # A long rope's table is computed with a look at the number of heads, though not with it: one config has one number.
        single = copy.deepcopy(config.per_layer_config[0])
        single.num_attention_heads = 1
        self.rotary_emb = Phi3RotaryEmbedding(config=single)
        self.gradient_checkpointing = False
        self.post_init()


class SelfPrunerPhi3ForCausalLM(SelfPrunerPhi3PreTrainedModel, Phi3ForCausalLM):
    def __init__(self, config: SelfPrunerPhi3Config) -> None:
        super(Phi3ForCausalLM, self).__init__(config)
        self.model = SelfPrunerPhi3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class SelfPrunerPhi3ForSequenceClassification(GenericForSequenceClassification, SelfPrunerPhi3PreTrainedModel):
    def __init__(self, config: SelfPrunerPhi3Config) -> None:
        # Past the generic constructor, which asks AutoModel, for the model of this file.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerPhi3Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class SelfPrunerPhi3ForTokenClassification(GenericForTokenClassification, SelfPrunerPhi3PreTrainedModel):
    def __init__(self, config: SelfPrunerPhi3Config) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerPhi3Model(config)
        self.dropout = nn.Dropout(0.1 if (rate := getattr(config, "classifier_dropout", None)) is None else rate)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "SelfPrunerPhi3Config",
    "SelfPrunerPhi3ForCausalLM",
    "SelfPrunerPhi3ForSequenceClassification",
    "SelfPrunerPhi3ForTokenClassification",
    "SelfPrunerPhi3Model",
]
