"""Model families. To add one: its layout (:mod:`selfpruner.models.family_layouts`), its own file, a line in ``FAMILIES``, its
modelling file (:mod:`selfpruner.export.modeling_files`), and a subclass of the conformance suite.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from selfpruner.architectures.base import Architecture
from selfpruner.architectures.gemma2 import Gemma2
from selfpruner.architectures.gemma3 import Gemma3
from selfpruner.architectures.llama import Llama
from selfpruner.architectures.mistral import Mistral
from selfpruner.architectures.opt import Opt
from selfpruner.architectures.phi3 import Phi3
from selfpruner.architectures.qwen2 import Qwen2
from selfpruner.architectures.qwen3 import Qwen3
from selfpruner.architectures.weights import AttentionWeights, FfnWeights, in_float32, with_tensors
from selfpruner.errors import UnsupportedModelError

FAMILIES: dict[str, type[Architecture]] = {cls.family: cls for cls in (Llama, Mistral, Qwen2, Qwen3, Opt, Gemma2, Gemma3, Phi3)}


def describe(model: PreTrainedModel) -> Architecture:
    """The architecture of a loaded model. Raises UnsupportedModelError naming the supported families."""
    family = str(model.config.model_type)
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"Models of type {family!r} are not supported. Supported: {', '.join(FAMILIES)}.", param="model"
        )
    return FAMILIES[family](model)


__all__ = ["FAMILIES", "Architecture", "AttentionWeights", "FfnWeights", "describe", "in_float32", "with_tensors"]
