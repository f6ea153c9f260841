"""The pruned model in memory: the base model's tensors, some of them replaced, under a config that says each layer's shape.

Tensors that pruning left alone are not copied. ``plain_config`` finds out whether the result is still an ordinary model of its
family, which then needs no code of ours to load.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING, AutoModelForCausalLM

from selfpruner.calibration.soundness import finite
from selfpruner.errors import ExportError
from selfpruner.export.modeling_files import modeling_file_of, own_fields
from selfpruner.models.family_layouts import LAYOUTS, family_of, layout_of
from selfpruner.models.streaming import compute_tables
from selfpruner.pruning.layer_shapes import LayerShape


def build(
    base: PreTrainedModel, shapes: Sequence[LayerShape], weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The pruned model on the base model's device, sharing every tensor that is not in ``weights``.

    ``shapes`` has one entry per layer. ``weights`` holds the tensors that differ from the base under the family's names
    (``model.layers.3.mlp.down_proj.weight``), biases included; a bias of an output matrix may exist in some layers only.
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
            problem = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ExportError(f"{name} should have shape {tuple(place.shape)} but is {problem}; give it in `weights`.")
        tensors[name] = narrowed(name, tensor.to(base.device), dtype)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    compute_tables(model, base.device)
    return model


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``. Raises ExportError where that cannot hold it: a repair may make weights larger."""
    cast = tensor.to(dtype)
    if dtype == torch.float16 and cast is not tensor and not finite(cast):
        raise ExportError(f"{name} has numbers that float16 cannot hold. Ask for dtype bfloat16 or float32.", param="dtype")
    return cast


def outline(base: PreTrainedModel, shapes: Sequence[LayerShape], names: Iterable[str], *, dtype: torch.dtype) -> PreTrainedModel:
    """The pruned model on the meta device: config and modules, no weights. ``names`` are tensors it has beyond the base model's.

    Raises ExportError for layer shapes that make no model.
    """
    if len(shapes) != base.config.num_hidden_layers:
        raise ExportError(f"The model has {base.config.num_hidden_layers} layers, but {len(shapes)} layer shapes were given.")
    try:
        config = _config(base, shapes, {*base.state_dict(), *names})
    except (ValueError, StrictDataclassError) as error:
        raise ExportError(f"These layer shapes make no model: {error}") from error
    with torch.device("meta"):
        cls = modeling_file_of(base.config).causal_lm
        model: PreTrainedModel = cls._from_config(config, dtype=dtype, attn_implementation=base.config._attn_implementation)
    model.generation_config = base.generation_config
    model.train(False)
    return model


def check_buildable(base: PreTrainedModel) -> None:
    """Try the outline of a pruned ``base`` whose layers differ, which costs nothing: a config from which none can be made is known
    before the work and not after it. Raises ExportError."""
    dense = shapes_of(base.config)
    shapes = [replace(shape, channels=max(1, shape.channels // (1 + index % 2))) for index, shape in enumerate(dense)]
    shapes[-1] = LayerShape(1, 1, 0)
    try:
        outline(base, shapes, [], dtype=base.dtype)
    except Exception as error:  # whatever transformers makes of a config it accepts for the dense model
        raise ExportError(
            f"No pruned model can be made from the config.json of this one: {error} Compare it with the one that was published.",
            param="model",
        ) from error


def shapes_of(config: PreTrainedConfig) -> list[LayerShape]:
    """The layer shapes a config describes, ordinary or per-layer."""
    shapes = []
    for layer in config.per_layer_config:
        heads, groups = int(layer.num_attention_heads), _kv_heads(layer)
        shapes.append(LayerShape(groups, heads // groups if groups else 0, int(getattr(layer, layout_of(config).channels_key))))
    return shapes


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the whole model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def expected_parameters(config: PreTrainedConfig) -> int:
    """Parameters that the shapes in the config of a pruned model imply, by arithmetic; tied ones count once."""
    layout = layout_of(config)
    d, h = int(config.hidden_size), int(config.head_dim)
    norm = d * layout.norm_vectors
    total = config.vocab_size * d * (1 if config.tie_word_embeddings else 2) + norm
    if layout.positions:
        total += (config.max_position_embeddings + layout.positions_before) * d
    for layer, shape in zip(config.per_layer_config, shapes_of(config), strict=True):
        biased, qk_norm = getattr(layer, "enable_bias", False), getattr(layer, "qk_norm", layout.qk_norm)
        attention_bias, mlp_bias = (getattr(layer, name, biased) for name in ("attention_bias", "mlp_bias"))
        if shape.heads:
            total += 2 * (shape.heads + shape.kv_groups) * h * d + norm * len(layout.attention_norms)
            total += (shape.heads + 2 * shape.kv_groups) * h * attention_bias + d * layer.o_proj_bias + 2 * h * qk_norm
        if shape.channels:
            total += len(layout.ffn) * shape.channels * d + norm * len(layout.ffn_norms)
            total += (len(layout.ffn) - 1) * shape.channels * mlp_bias + d * layer.down_proj_bias
    return int(total)


def plain_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """The base family's own config when it describes ``model`` completely (uniform shapes, no extra bias), else None."""
    config = model.config
    if config.is_heterogeneous or not all(shape.heads and shape.channels for shape in shapes_of(config)):
        return None
    twin = ordinary(config, config.base_model_type, shapes_of(config)[0])
    if twin is None:
        return None
    same = {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    plain: PreTrainedConfig = twin.config
    return plain if same else None


def ordinary(config: PreTrainedConfig, family: str, shape: LayerShape, **biases: bool) -> PreTrainedModel | None:
    """An ordinary model of ``family`` on the meta device whose layers all have ``shape``, in all else as ``config`` says, a
    checkpoint's, but for ``attention_bias`` and ``mlp_bias`` where they are given and the family leaves a choice. None where its
    own rules refuse the shape."""
    classes = CONFIG_MAPPING[family]
    own = own_fields(classes)
    given = {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_groups,
        LAYOUTS[family].channels_key: shape.channels,
    }
    taken = {name: getattr(config, name) for name in own - given.keys() if hasattr(config, name)}
    body: dict[str, object] = {"dtype": config.dtype, **taken, **{name: value for name, value in given.items() if name in own}}
    body |= {name: value for name, value in biases.items() if name in own}
    if "use_sliding_window" in own:
        body["use_sliding_window"] = getattr(config, "sliding_window", None) is not None
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if "head_dim" not in own and head_dim * shape.heads != config.hidden_size:
        body["head_dim"] = head_dim
    try:
        plain = classes.from_dict(body)
        with torch.device("meta"):
            twin: PreTrainedModel = AutoModelForCausalLM.from_config(plain)
    except (ValueError, StrictDataclassError):
        # For instance heads that do not divide the hidden size.
        return None
    plain.architectures = [type(twin).__name__]
    return twin


def _config(base: PreTrainedModel, shapes: Sequence[LayerShape], names: set[str]) -> PreTrainedConfig:
    """The base config with what differs by layer in ``per_layer_config``; a value that all layers share becomes global."""
    config = base.config
    layout, form = layout_of(config), modeling_file_of(config)
    channels = layout.channels_key
    heads = config.num_attention_heads
    width = base.get_parameter(f"{layout.layer(0)}.{layout.attention['o']}.weight").shape[1]
    dense = {"num_attention_heads": heads, channels: getattr(config, channels)}
    if form.has_kv_heads:
        dense["num_key_value_heads"] = _kv_heads(config)
    layers: list[dict[str, object]] = [
        {
            "num_attention_heads": shape.heads,
            **({"num_key_value_heads": shape.kv_groups} if form.has_kv_heads else {}),
            channels: shape.channels,
            # A dropped block has no bias; naming the common value keeps its entry short.
            "o_proj_bias": f"{layout.layer(index)}.{layout.attention['o']}.bias" in names if shape.heads else None,
            "down_proj_bias": f"{layout.layer(index)}.{layout.ffn['down']}.bias" in names if shape.channels else None,
        }
        for index, shape in enumerate(shapes)
    ]
    common: dict[str, object] = {}
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
    inherited = {name: copy.deepcopy(getattr(config, name)) for name in own_fields(form.config) if hasattr(config, name)}
    own = {"base_model_type": family_of(config), "head_dim": width // heads}
    made = form.config(**{**inherited, **form.switches(config, names), **own, **common})
    made.auto_map = form.auto_map  # also where it is saved from memory, and not by an export
    found: PreTrainedConfig = made
    return found


def _kv_heads(config: PreTrainedConfig) -> int:
    """KV heads of a config; of a family that does not say, every query head has its own."""
    return int(getattr(config, "num_key_value_heads", config.num_attention_heads))
