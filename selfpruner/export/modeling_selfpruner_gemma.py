"""Gemma 2 and Gemma 3 (text) whose layers differ in width, after structured pruning, for transformers >= 5.15.

This file travels inside the checkpoint and needs nothing but torch, transformers and huggingface_hub. The configs and the names of
tensors are the families'; ``per_layer_config`` names what a layer has less of: ``num_attention_heads``, ``num_key_value_heads``,
``intermediate_size``; 0 means that the layer has no attention, or no FFN, and neither of the norms around it.

    base_model_type   the family the model was made from; informative
    attention_bias    biases on q, k and v
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
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma2PreTrainedModel,
    Gemma2RMSNorm,
    Gemma2RotaryEmbedding,
    Gemma2TextScaledWordEmbedding,
)
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3ForCausalLM,
    Gemma3PreTrainedModel,
    Gemma3RMSNorm,
    Gemma3RotaryEmbedding,
    Gemma3TextModel,
    Gemma3TextScaledWordEmbedding,
)


def _check_heads(config: PreTrainedConfig) -> None:
    for index, layer in enumerate(config.per_layer_config):
        heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
        if (heads == 0) != (kv_heads == 0) or (kv_heads and heads % kv_heads):
            raise ValueError(f"layer {index}: {heads} query heads do not divide into {kv_heads} KV heads")


def _has_long_rope(config: PreTrainedConfig) -> bool:
    """Whether a config, which may have a rope for each type of layer, has a long one. The families' own check of them divides the
    hidden size by the heads, which differ; here they must have as many factors as the rotary table has columns."""
    rope = config.rope_parameters or {}
    tables = [table for table in (rope, *rope.values()) if isinstance(table, dict) and table.get("rope_type") == "longrope"]
    for table in tables:
        for name in ("short_factor", "long_factor"):
            if len(table[name]) != config.head_dim // 2:
                raise ValueError(f"rope_parameters: {name} must have {config.head_dim // 2} numbers, not {len(table[name])}")
    return bool(tables)


@strict
class SelfPrunerGemma2Config(Gemma2Config):
    """Gemma 2's config with per-layer widths and the switches above."""

    model_type = "selfpruner_gemma2"

    base_model_type: str = "gemma2"
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_rope(self) -> None:
        if not _has_long_rope(self):
            super().validate_rope()

    def validate_architecture(self) -> None:
        """head_dim is explicit, so hidden_size need not divide by the heads; query heads must divide by the KV heads."""
        _check_heads(self)


@strict
class SelfPrunerGemma3Config(Gemma3TextConfig):
    """The config of Gemma 3's text models with per-layer widths and the switches above."""

    model_type = "selfpruner_gemma3"

    base_model_type: str = "gemma3_text"
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_rope(self) -> None:
        if not _has_long_rope(self):
            super().validate_rope()

    def validate_architecture(self) -> None:
        """head_dim is explicit, so hidden_size need not divide by the heads; query heads must divide by the KV heads."""
        _check_heads(self)


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


class SelfPrunerGemmaDropped(nn.Module):
    """Stands where an attention was dropped: it keeps the length of the cache, and gives None for attention weights. (transformers
    looks for classes of this kind with "Attention" in their name, and would then let nobody choose how attention is computed.)"""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
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


def _single(config: PreTrainedConfig) -> PreTrainedConfig:
    """Some rotary tables (yarn, dynamic) are computed with a look at the number of heads, though not with it: one that has one."""
    single = copy.deepcopy(config.per_layer_config[0])
    single.num_attention_heads = 1
    return single


def _with_output(attention: nn.Module, config: PreTrainedConfig, layer: PreTrainedConfig) -> None:
    """Give an attention that was built from ``layer``, its own config, the output matrix of that and the model's ``config``."""
    if layer.o_proj_bias != layer.attention_bias:
        attention.o_proj = nn.Linear(layer.num_attention_heads * layer.head_dim, layer.hidden_size, bias=layer.o_proj_bias)
    # The model's config carries the attention implementation, also when it is switched later.
    attention.config = config


class SelfPrunerGemma2Attention(Gemma2Attention):
    def __init__(self, config: SelfPrunerGemma2Config, layer: SelfPrunerGemma2Config, layer_idx: int) -> None:
        super().__init__(layer, layer_idx)
        _with_output(self, config, layer)


class SelfPrunerGemma3Attention(Gemma3Attention):
    def __init__(self, config: SelfPrunerGemma3Config, layer: SelfPrunerGemma3Config, layer_idx: int) -> None:
        super().__init__(layer, layer_idx)
        _with_output(self, config, layer)


class SelfPrunerGemmaMLP(nn.Module):
    def __init__(self, layer: PreTrainedConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(layer.hidden_size, layer.intermediate_size, bias=False)
        self.up_proj = nn.Linear(layer.hidden_size, layer.intermediate_size, bias=False)
        self.down_proj = nn.Linear(layer.intermediate_size, layer.hidden_size, bias=layer.down_proj_bias)
        self.act_fn = ACT2FN[layer.hidden_activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _DecoderLayer(GradientCheckpointingLayer):
    attention_class: type[nn.Module]
    norm_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.layer_idx = layer_idx
        self.has_attention = layer.num_attention_heads > 0
        self.kv_heads = layer.num_key_value_heads
        self.has_mlp = layer.intermediate_size > 0
        size, eps = layer.hidden_size, layer.rms_norm_eps
        if self.has_attention:
            self.self_attn = self.attention_class(config, layer, layer_idx)
            self.input_layernorm = self.norm_class(size, eps=eps)
            self.post_attention_layernorm = self.norm_class(size, eps=eps)
        else:
            self.no_attn = SelfPrunerGemmaDropped(config, layer_idx)
        if self.has_mlp:
            self.mlp = SelfPrunerGemmaMLP(layer)
            self.pre_feedforward_layernorm = self.norm_class(size, eps=eps)
            self.post_feedforward_layernorm = self.norm_class(size, eps=eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
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
            hidden_states = hidden_states + self.post_attention_layernorm(attended)
        else:
            self.no_attn(hidden_states, past_key_values)
        if self.has_mlp:
            computed = self.mlp(self.pre_feedforward_layernorm(hidden_states))
            hidden_states = hidden_states + self.post_feedforward_layernorm(computed)
        return hidden_states


class SelfPrunerGemma2DecoderLayer(_DecoderLayer):
    attention_class = SelfPrunerGemma2Attention
    norm_class = Gemma2RMSNorm


class SelfPrunerGemma3DecoderLayer(_DecoderLayer):
    attention_class = SelfPrunerGemma3Attention
    norm_class = Gemma3RMSNorm


class SelfPrunerGemma2PreTrainedModel(Gemma2PreTrainedModel):
    config: SelfPrunerGemma2Config
    config_class = SelfPrunerGemma2Config
    _no_split_modules = ["SelfPrunerGemma2DecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SelfPrunerGemma2DecoderLayer,
        "attentions": [SelfPrunerGemma2Attention, SelfPrunerGemmaDropped],
    }


class SelfPrunerGemma2Model(SelfPrunerGemma2PreTrainedModel, Gemma2Model):
    def __init__(self, config: SelfPrunerGemma2Config) -> None:
        # Past Gemma2Model's constructor, which would build layers of one width; its forward is used as it is.
        super(Gemma2Model, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = Gemma2TextScaledWordEmbedding(
            config.vocab_size, config.hidden_size, self.padding_idx, embed_scale=config.hidden_size**0.5
        )
        self.layers = nn.ModuleList([SelfPrunerGemma2DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Gemma2RotaryEmbedding(_single(config))
        self.gradient_checkpointing = False
        self.post_init()


class SelfPrunerGemma2ForCausalLM(SelfPrunerGemma2PreTrainedModel, Gemma2ForCausalLM):
    def __init__(self, config: SelfPrunerGemma2Config) -> None:
        super(Gemma2ForCausalLM, self).__init__(config)
        self.model = SelfPrunerGemma2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class SelfPrunerGemma2ForSequenceClassification(GenericForSequenceClassification, SelfPrunerGemma2PreTrainedModel):
    def __init__(self, config: SelfPrunerGemma2Config) -> None:
        # Past the generic constructor, which asks AutoModel, for the model of this file.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerGemma2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class SelfPrunerGemma2ForTokenClassification(GenericForTokenClassification, SelfPrunerGemma2PreTrainedModel):
    def __init__(self, config: SelfPrunerGemma2Config) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerGemma2Model(config)
        self.dropout = nn.Dropout(0.1 if (rate := getattr(config, "classifier_dropout", None)) is None else rate)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class SelfPrunerGemma3PreTrainedModel(Gemma3PreTrainedModel):
    config: SelfPrunerGemma3Config
    config_class = SelfPrunerGemma3Config
    _no_split_modules = ["SelfPrunerGemma3DecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SelfPrunerGemma3DecoderLayer,
        "attentions": [SelfPrunerGemma3Attention, SelfPrunerGemmaDropped],
    }


class SelfPrunerGemma3Model(SelfPrunerGemma3PreTrainedModel, Gemma3TextModel):
    config: SelfPrunerGemma3Config

    def __init__(self, config: SelfPrunerGemma3Config) -> None:
        # Past Gemma3TextModel's constructor, which would build layers of one width; its forward is used as it is.
        super(Gemma3TextModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = Gemma3TextScaledWordEmbedding(
            config.vocab_size, config.hidden_size, self.padding_idx, embed_scale=config.hidden_size**0.5
        )
        self.layers = nn.ModuleList([SelfPrunerGemma3DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Gemma3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Gemma3RotaryEmbedding(_single(config))
        self.gradient_checkpointing = False
        self.post_init()


class SelfPrunerGemma3ForCausalLM(SelfPrunerGemma3PreTrainedModel, Gemma3ForCausalLM):
    config: SelfPrunerGemma3Config

    def __init__(self, config: SelfPrunerGemma3Config) -> None:
        super(Gemma3ForCausalLM, self).__init__(config)
        self.model = SelfPrunerGemma3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class SelfPrunerGemma3ForSequenceClassification(GenericForSequenceClassification, SelfPrunerGemma3PreTrainedModel):
    config: SelfPrunerGemma3Config

    def __init__(self, config: SelfPrunerGemma3Config) -> None:
        # Past the generic constructor, which asks AutoModel, for the model of this file.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerGemma3Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class SelfPrunerGemma3ForTokenClassification(GenericForTokenClassification, SelfPrunerGemma3PreTrainedModel):
    config: SelfPrunerGemma3Config

    def __init__(self, config: SelfPrunerGemma3Config) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfPrunerGemma3Model(config)
        self.dropout = nn.Dropout(0.1 if (rate := getattr(config, "classifier_dropout", None)) is None else rate)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "SelfPrunerGemma2Config",
    "SelfPrunerGemma2ForCausalLM",
    "SelfPrunerGemma2ForSequenceClassification",
    "SelfPrunerGemma2ForTokenClassification",
    "SelfPrunerGemma2Model",
    "SelfPrunerGemma3Config",
    "SelfPrunerGemma3ForCausalLM",
    "SelfPrunerGemma3ForSequenceClassification",
    "SelfPrunerGemma3ForTokenClassification",
    "SelfPrunerGemma3Model",
]
