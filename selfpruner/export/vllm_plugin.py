"""vLLM calls this when it starts: checkpoints whose layers differ are then served natively, with no code from their folder.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` wherever selfpruner is installed beside it, and calls it in
each of its processes. Imports no vLLM; :mod:`selfpruner.export.vllm_model` and :mod:`selfpruner.export.vllm_opt` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfpruner.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The modules that have the native classes, by the names that checkpoints say.
ARCHITECTURES = {
    "SelfPrunerForCausalLM": "selfpruner.export.vllm_model",
    "SelfPrunerPhi3ForCausalLM": "selfpruner.export.vllm_model",
    "SelfPrunerGemma2ForCausalLM": "selfpruner.export.vllm_model",
    "SelfPrunerGemma3ForCausalLM": "selfpruner.export.vllm_model",
    "SelfPrunerOPTForCausalLM": "selfpruner.export.vllm_opt",
}
# Names that configs of these families use; vLLM knows their gated forms.
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "silu", "swish")


def register() -> None:
    """Make config and model known to transformers and vLLM. Calling it again changes nothing."""
    from vllm import ModelRegistry

    import selfpruner.export  # noqa: F401 - registers the config with transformers

    # By name: a class is imported where the model is built, after vLLM has chosen its device.
    for name, module in ARCHITECTURES.items():
        ModelRegistry.register_model(name, f"{module}:{name}")


def activation(config: PreTrainedConfig) -> str:
    """The name of the FFN's activation, wherever a family's config has it."""
    keys = ("hidden_act", "hidden_activation", "activation_function")
    return next(str(found) for key in keys if (found := getattr(config, key, None)) is not None)


def check(config: PreTrainedConfig, tensor_parallel: int) -> None:
    """Whether the native class can compute ``config`` on ``tensor_parallel`` devices.

    vLLM cuts heads and channels of every layer into equal shares; KV heads may also be fewer than devices and are then copied.
    Raises UnsupportedModelError with the first layer that does not divide, and what to do.
    """
    gated = not hasattr(config.per_layer_config[0], "ffn_dim")
    if gated and activation(config) not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"vLLM has no gated form of the activation {activation(config)!r}; known: {', '.join(ACTIVATIONS)}. "
            "Serve the folder with --model-impl transformers --trust-remote-code."
        )
    if not any(layer.num_attention_heads for layer in config.per_layer_config):
        raise UnsupportedModelError("No layer of this plan has attention; vLLM serves only models that have a KV cache.")
    for index, layer in enumerate(config.per_layer_config):
        heads, channels = layer.num_attention_heads, layer.intermediate_size if gated else layer.ffn_dim
        groups = int(getattr(layer, "num_key_value_heads", heads) or 0)
        copies = 0 < groups < tensor_parallel and tensor_parallel % groups == 0
        counts = {"query heads": heads, "KV heads": 0 if copies else groups, "FFN channels": channels}
        for what, count in counts.items():
            if count % tensor_parallel:
                raise UnsupportedModelError(
                    f"Layer {index} keeps {count} {what}, which {tensor_parallel} devices cannot share evenly. Serve the model "
                    f"with --tensor-parallel-size 1, or search with tensor_parallel={tensor_parallel}."
                )
