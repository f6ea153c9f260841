"""A decoder whose layers differ in width: Llama, Mistral, Qwen2 and Qwen3 after structured pruning, for transformers >= 5.15.

This file travels inside the checkpoint and needs nothing but torch, transformers and huggingface_hub. The config is the base
family's, with ``per_layer_config`` naming what a layer has less of: ``num_attention_heads``, ``num_key_value_heads``,
``intermediate_size``; 0 means that the layer has no attention, or no FFN, and no norm before it. Tensor names are Llama's.

    base_model_type   the family the model was made from; informative
    qk_norm           RMS norms on the heads of q and k (Qwen3)
    attention_bias    biases on q, k and v
    o_proj_bias       bias on o_proj; may differ by layer
    mlp_bias          biases on gate_proj and up_proj
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
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention


@strict
class SelfPrunerConfig(LlamaConfig):
    """Llama's config with per-layer widths and the switches above. ``layer_types`` follows from ``sliding_window`` if absent."""

    model_type = "selfpruner"

    base_model_type: str = "llama"
    qk_norm: bool = False
    o_proj_bias: bool = False
    down_proj_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_rope(self) -> None:
        """As many factors as the rotary table has columns. Llama's own check divides the hidden size by the heads, which differ."""
        rope = self.rope_parameters or {}
        if rope.get("rope_type") != "longrope":
            super().validate_rope()
        half = int(self.head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        for name, factors in (("short_factor", rope.get("short_factor")), ("long_factor", rope.get("long_factor"))):
            if factors is not None and len(factors) != half:
                raise ValueError(f"rope_parameters: {name} must have {half} numbers, not {len(factors)}")

    def validate_architecture(self) -> None:
        """head_dim is explicit, so hidden_size need not divide by the heads; query heads must divide by the KV heads."""
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


class SelfPrunerDropped(nn.Module):
    """Stands where an attention was dropped: it keeps the length of the cache, and gives None for attention weights. (transformers
    looks for classes of this kind with "Attention" in their name, and would then let nobody choose how attention is computed.)"""

    def __init__(self, config: SelfPrunerConfig, layer_idx: int) -> None:
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


class SelfPrunerAttention(Qwen3Attention):
    """Attention with the head counts, norms and biases of ``layer``, its own config; ``config`` is the model's."""

    def __init__(self, config: SelfPrunerConfig, layer: SelfPrunerConfig, layer_idx: int) -> None:
        super().__init__(layer, layer_idx)
        if layer.o_proj_bias != layer.attention_bias:
            self.o_proj = nn.Linear(layer.num_attention_heads * self.head_dim, layer.hidden_size, bias=layer.o_proj_bias)
        if not layer.qk_norm:
            self.q_norm = nn.Identity()
            self.k_norm = nn.Identity()
        # The model's config carries the attention implementation, also when it is switched later.
        self.config = config


class SelfPrunerMLP(nn.Module):
    def __init__(self, layer: SelfPrunerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(layer.hidden_size, layer.intermediate_size, bias=layer.mlp_bias)
        self.up_proj = nn.Linear(layer.hidden_size, layer.intermediate_size, bias=layer.mlp_bias)
        self.down_proj = nn.Linear(layer.intermediate_size, layer.hidden_size, bias=layer.down_proj_bias)
        self.act_fn = ACT2FN[layer.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SelfPrunerDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SelfPrunerConfig, layer_idx: int) -> None:
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.layer_idx = layer_idx
        self.hidden_size = layer.hidden_size
        self.has_attention = layer.num_attention_heads > 0
        self.kv_heads = layer.num_key_value_heads
        self.has_mlp = layer.intermediate_size > 0
        if self.has_attention:
            self.self_attn = SelfPrunerAttention(config, layer, layer_idx)
            self.input_layernorm = Qwen2RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        else:
            self.no_attn = SelfPrunerDropped(config, layer_idx)
        if self.has_mlp:
            self.mlp = SelfPrunerMLP(layer)
            self.post_attention_layernorm = Qwen2RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if self.has_attention:
            if past_key_values is not None:
                _check_cache(past_key_values, self.layer_idx, self.kv_heads)
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            hidden_states = hidden_states + attended
        else:
            self.no_attn(hidden_states, past_key_values)
        if self.has_mlp:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class SelfPrunerPreTrainedModel(Qwen2PreTrainedModel):
    config: SelfPrunerConfig
    config_class = SelfPrunerConfig
    _no_split_modules = ["SelfPrunerDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SelfPrunerDecoderLayer,
        "attentions": [SelfPrunerAttention, SelfPrunerDropped],
    }


class SelfPrunerModel(SelfPrunerPreTrainedModel, Qwen2Model):
    def __init__(self, config: SelfPrunerConfig) -> None:
        # Past Qwen2Model's constructor, which would build layers of one width; its forward is used as it is.
        super(Qwen2Model, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([SelfPrunerDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Some tables (yarn, longrope) are computed with a look at the number of heads, though not with it: so one that has one.
        single = copy.deepcopy(config.per_layer_config[0])
        single.num_attention_heads = 1
        self.rotary_emb = Qwen2RotaryEmbedding(config=single)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.post_init()


class SelfPrunerForCausalLM(SelfPrunerPreTrainedModel, Qwen2ForCausalLM):
    def __init__(self, config: SelfPrunerConfig) -> None:
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = SelfPrunerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class SelfPrunerForSequenceClassification(GenericForSequenceClassification, SelfPrunerPreTrainedModel):
    def __init__(self, config: SelfPrunerConfig) -> None:
        # Past the generic constructor, which asks AutoModel, for the model of this file.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class SelfPrunerForTokenClassification(GenericForTokenClassification, SelfPrunerPreTrainedModel):
    def __init__(self, config: SelfPrunerConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerModel(config)
        self.dropout = nn.Dropout(0.1 if (rate := getattr(config, "classifier_dropout", None)) is None else rate)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "SelfPrunerConfig",
    "SelfPrunerForCausalLM",
    "SelfPrunerForSequenceClassification",
    "SelfPrunerForTokenClassification",
    "SelfPrunerModel",
]
