"""The forms in which pruned models are written: a modelling file with its classes, and the families it is for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from selfpruner.export.modeling_selfpruner import SelfPrunerConfig, SelfPrunerForCausalLM, SelfPrunerModel
from selfpruner.export.modeling_selfpruner_gemma import (
    SelfPrunerGemma2Config,
    SelfPrunerGemma2ForCausalLM,
    SelfPrunerGemma2Model,
    SelfPrunerGemma3Config,
    SelfPrunerGemma3ForCausalLM,
    SelfPrunerGemma3Model,
)
from selfpruner.export.modeling_selfpruner_opt import SelfPrunerOPTConfig, SelfPrunerOPTForCausalLM, SelfPrunerOPTModel
from selfpruner.export.modeling_selfpruner_phi3 import SelfPrunerPhi3Config, SelfPrunerPhi3ForCausalLM, SelfPrunerPhi3Model
from selfpruner.layouts import family_of


@dataclass(frozen=True, slots=True)
class Form:
    """``switches`` gives what the form's config has beyond the base family's, from the base config and the names of all tensors;
    what both have is taken over. By layer differ the config's ``num_attention_heads``, ``num_key_value_heads`` where it has such,
    the layout's ``channels_key``, ``o_proj_bias`` and ``down_proj_bias``."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    switches: Callable[[Any, Collection[str]], dict[str, Any]] = lambda _config, _names: {}

    @property
    def code(self) -> Path:
        """The modelling file."""
        return Path(str(sys.modules[self.config.__module__].__file__))

    @property
    def auto_map(self) -> dict[str, str]:
        classes = {"AutoConfig": self.config, "AutoModel": self.model, "AutoModelForCausalLM": self.causal_lm}
        return {auto: f"{self.code.stem}.{cls.__name__}" for auto, cls in classes.items()}

    @property
    def has_kv_heads(self) -> bool:
        return "num_key_value_heads" in own_fields(self.config)


def own_fields(config: type[PreTrainedConfig]) -> set[str]:
    """The fields of a family's config beyond those that all configs have."""
    return {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)}


def _llama_switches(config: Any, names: Collection[str]) -> dict[str, Any]:
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    llama = config.model_type == "llama"  # ignores a sliding window, whatever its config says
    return {
        "attention_bias": attention + "q_proj.bias" in names,
        "mlp_bias": mlp + "gate_proj.bias" in names,
        "qk_norm": attention + "q_norm.weight" in names,
        "sliding_window": None if llama else getattr(config, "sliding_window", None),
        "layer_types": None if llama else getattr(config, "layer_types", None),
    }


_LLAMA = Form(SelfPrunerConfig, SelfPrunerModel, SelfPrunerForCausalLM, _llama_switches)
FORMS: Mapping[str, Form] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gemma2": Form(SelfPrunerGemma2Config, SelfPrunerGemma2Model, SelfPrunerGemma2ForCausalLM),
    "gemma3_text": Form(SelfPrunerGemma3Config, SelfPrunerGemma3Model, SelfPrunerGemma3ForCausalLM),
    "phi3": Form(SelfPrunerPhi3Config, SelfPrunerPhi3Model, SelfPrunerPhi3ForCausalLM),
    "opt": Form(SelfPrunerOPTConfig, SelfPrunerOPTModel, SelfPrunerOPTForCausalLM),
}


def form_of(config: Any) -> Form:
    return FORMS[family_of(config)]
