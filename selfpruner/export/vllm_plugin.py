"""What vLLM calls when it starts: a checkpoint whose layers differ in width is then served natively, with no code from its folder.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` wherever selfpruner is installed beside it, and calls it in
each of its processes. Imports no vLLM; :mod:`selfpruner.export.vllm_model` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfpruner.errors import UnsupportedModelError

if TYPE_CHECKING:
    from selfpruner.export.modeling_selfpruner import SelfPrunerConfig

ARCHITECTURE = "SelfPrunerForCausalLM"
# Of the names that configs of these families use; vLLM knows their gated forms.
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "silu", "swish")


def register() -> None:
    """Make config and model known to transformers and vLLM. Calling it again changes nothing."""
    from vllm import ModelRegistry

    import selfpruner.export  # noqa: F401 - registers the config with transformers

    # By name: the class is imported where the model is built, after vLLM has chosen its device.
    ModelRegistry.register_model(ARCHITECTURE, f"selfpruner.export.vllm_model:{ARCHITECTURE}")


def check(config: SelfPrunerConfig, tensor_parallel: int) -> None:
    """Whether the native class can compute ``config`` on ``tensor_parallel`` devices.

    vLLM cuts heads and channels of every layer into equal shares; KV heads may also be fewer than devices and are then copied.
    Raises UnsupportedModelError with the first layer that does not divide, and what to do.
    """
    if config.hidden_act not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"vLLM has no gated form of the activation {config.hidden_act!r}; known: {', '.join(ACTIVATIONS)}. "
            "Serve the folder with --model-impl transformers --trust-remote-code."
        )
    if not any(layer.num_attention_heads for layer in config.per_layer_config):
        raise UnsupportedModelError("No layer of this plan has attention; vLLM serves only models that have a KV cache.")
    for index, layer in enumerate(config.per_layer_config):
        heads, groups, channels = layer.num_attention_heads, int(layer.num_key_value_heads or 0), layer.intermediate_size
        copies = 0 < groups < tensor_parallel and tensor_parallel % groups == 0
        counts = {"query heads": heads, "KV heads": 0 if copies else groups, "FFN channels": channels}
        for what, count in counts.items():
            if count % tensor_parallel:
                raise UnsupportedModelError(
                    f"Layer {index} keeps {count} {what}, which {tensor_parallel} devices cannot share evenly. Serve the model "
                    f"with --tensor-parallel-size 1, or search with tensor_parallel={tensor_parallel}."
                )
