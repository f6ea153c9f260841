"""The pruned model in memory: the base model's tensors, some of them replaced, under a config that says each layer's shape.

Nothing is copied that the pruning left alone. ``plain_config`` finds out whether the result is still an ordinary model of its
family, which then needs no code of ours to load.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING, AutoModelForCausalLM

from selfpruner.errors import ExportError
from selfpruner.export.modeling_selfpruner import SelfPrunerConfig, SelfPrunerForCausalLM
from selfpruner.export.shape import LayerShape

# What the base family's config decides and pruning never changes.
_INHERITED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "rms_norm_eps", "initializer_range", "attention_dropout"),
    *("max_position_embeddings", "rope_parameters", "tie_word_embeddings", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


def build(
    base: PreTrainedModel, shapes: Sequence[LayerShape], weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> SelfPrunerForCausalLM:
    """The pruned model on the base model's device, sharing every tensor that is not in ``weights``.

    ``shapes`` has one entry per layer. ``weights`` holds the tensors that differ from the base under Llama's names
    (``model.layers.3.mlp.down_proj.weight``), biases included; a bias of o_proj or down_proj may exist in some layers only.
    They are cast to the base model's dtype; another ``dtype`` casts, and so copies, everything. Raises ExportError when a
    tensor is missing, left over or of the wrong shape.
    """
    dtype = dtype or base.dtype
    dense: dict[str, Tensor] = base.state_dict()
    model = outline(base, shapes, weights.keys(), dtype=dtype)
    wanted = model.state_dict()
    if unused := sorted(weights.keys() - wanted.keys()):
        raise ExportError(f"Tensors that the pruned model has no place for: {', '.join(unused[:5])}.")
    tensors: dict[str, Tensor] = {}
    for name, place in wanted.items():
        tensor = weights[name].detach() if name in weights else dense.get(name)
        if tensor is None or tensor.shape != place.shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ExportError(f"{name} should have shape {tuple(place.shape)} but is {found}; give it in `weights`.")
        tensors[name] = tensor.to(base.device, dtype)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    # Its table is computed, not stored, and was computed on the meta device above.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(base.device)
    return model


def outline(
    base: PreTrainedModel, shapes: Sequence[LayerShape], names: Iterable[str], *, dtype: torch.dtype
) -> SelfPrunerForCausalLM:
    """The pruned model on the meta device: config and modules, no weights. ``names`` are tensors it has beyond the base model's.

    Raises ExportError for layer shapes that make no model.
    """
    if len(shapes) != base.config.num_hidden_layers:
        raise ExportError(f"The model has {base.config.num_hidden_layers} layers, but {len(shapes)} layer shapes were given.")
    try:
        config = _config(base, shapes, {*base.state_dict(), *names})
    except ValueError as error:
        raise ExportError(f"These layer shapes make no model: {error}") from error
    with torch.device("meta"):
        model: SelfPrunerForCausalLM = SelfPrunerForCausalLM._from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=base.config._attn_implementation
        )
    model.generation_config = base.generation_config
    model.train(False)
    return model


def shapes_of(config: PreTrainedConfig) -> list[LayerShape]:
    """The layer shapes a config describes, ordinary or per-layer."""
    shapes = []
    for layer in config.per_layer_config:
        heads, groups = int(layer.num_attention_heads), int(layer.num_key_value_heads)
        shapes.append(LayerShape(groups, heads // groups if groups else 0, int(layer.intermediate_size)))
    return shapes


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the whole model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def expected_parameters(config: SelfPrunerConfig) -> int:
    """Parameters that the shapes in ``config`` imply, by arithmetic; tied ones count once."""
    d, h = config.hidden_size, int(config.head_dim or 0)
    total = config.vocab_size * d * (1 if config.tie_word_embeddings else 2) + d
    for layer in config.per_layer_config:
        assert isinstance(layer, SelfPrunerConfig)
        heads, groups, channels = layer.num_attention_heads, int(layer.num_key_value_heads or 0), layer.intermediate_size
        if heads:
            total += 2 * (heads + groups) * h * d + d
            total += (heads + 2 * groups) * h * layer.attention_bias + d * layer.o_proj_bias + 2 * h * layer.qk_norm
        if channels:
            total += 3 * channels * d + d + 2 * channels * layer.mlp_bias + d * layer.down_proj_bias
    return total


def plain_config(model: SelfPrunerForCausalLM) -> PreTrainedConfig | None:
    """The base family's own config when it describes ``model`` completely (uniform shapes, no extra bias), else None."""
    config = model.config
    if config.is_heterogeneous or not config.num_attention_heads or not config.intermediate_size:
        return None
    twin = ordinary(config, config.base_model_type, shapes_of(config)[0], biases=(config.attention_bias, config.mlp_bias))
    if twin is None:
        return None
    same = {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    plain: PreTrainedConfig = twin.config
    return plain if same else None


def ordinary(config: PreTrainedConfig, family: str, shape: LayerShape, *, biases: tuple[bool, bool]) -> PreTrainedModel | None:
    """An ordinary model of ``family`` on the meta device whose layers all have ``shape``, in all else as ``config`` says, a
    checkpoint's. ``biases``: of attention and FFN, where the family leaves a choice. None where its own rules refuse the shape."""
    classes = CONFIG_MAPPING[family]
    own = {field.name for field in fields(classes)}
    body = {name: getattr(config, name) for name in _INHERITED}
    body |= {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_groups,
        "intermediate_size": shape.channels,
        "head_dim": config.head_dim,
        "dtype": config.dtype,
    }
    chosen: dict[str, Any] = {"attention_bias": biases[0], "mlp_bias": biases[1]}
    chosen |= {name: getattr(config, name, None) for name in ("sliding_window", "layer_types")}
    body |= {name: value for name, value in chosen.items() if name in own}
    if "use_sliding_window" in own:
        body["use_sliding_window"] = chosen["sliding_window"] is not None
    try:
        plain = classes(**body)
        with torch.device("meta"):
            twin: PreTrainedModel = AutoModelForCausalLM.from_config(plain)
    except ValueError:
        # For instance heads that do not divide the hidden size.
        return None
    plain.architectures = [type(twin).__name__]
    return twin


def _config(base: PreTrainedModel, shapes: Sequence[LayerShape], names: set[str]) -> SelfPrunerConfig:
    """The base config with what differs by layer in ``per_layer_config``; a value that all layers share becomes global."""
    config = base.config
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q_rows = base.get_parameter("model.layers.0.self_attn.q_proj.weight").shape[0]
    dense = {"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": config.intermediate_size}
    layers: list[dict[str, Any]] = [
        {
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_groups,
            "intermediate_size": shape.channels,
            # A dropped block has no bias; naming the common value keeps its entry short.
            "o_proj_bias": attention.format(index) + "o_proj.bias" in names if shape.heads else None,
            "down_proj_bias": mlp.format(index) + "down_proj.bias" in names if shape.channels else None,
        }
        for index, shape in enumerate(shapes)
    ]
    common: dict[str, Any] = {}
    for key in layers[0]:
        values = {layer[key] for layer in layers} - {None}
        common[key] = values.pop() if len(values) == 1 else dense.get(key, False)
    per_layer = {
        index: changed
        for index, layer in enumerate(layers)
        if (changed := {key: value for key, value in layer.items() if value is not None and value != common[key]})
    }
    if per_layer:
        common["per_layer_config"] = per_layer
    llama = config.model_type == "llama"  # ignores a sliding window, whatever its config says
    return SelfPrunerConfig(
        **{name: copy.deepcopy(getattr(config, name)) for name in _INHERITED},
        **common,
        base_model_type=config.model_type,
        head_dim=q_rows // heads,
        attention_bias=attention.format(0) + "q_proj.bias" in names,
        mlp_bias=mlp.format(0) + "gate_proj.bias" in names,
        qk_norm=attention.format(0) + "q_norm.weight" in names,
        sliding_window=None if llama else getattr(config, "sliding_window", None),
        layer_types=None if llama else getattr(config, "layer_types", None),
    )
