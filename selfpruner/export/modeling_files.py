"""The modelling files that pruned models are written with: their classes, and the families each is for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from selfpruner.export import modeling_selfpruner as llama
from selfpruner.export import modeling_selfpruner_gemma as gemma
from selfpruner.export import modeling_selfpruner_opt as opt
from selfpruner.export import modeling_selfpruner_phi3 as phi3
from selfpruner.models.family_layouts import family_of


@dataclass(frozen=True, slots=True)
class ModelingFile:
    """``switches`` gives what the form's config has beyond the base family's, from the base config and the names of all tensors;
    what both have is taken over. By layer differ the config's ``num_attention_heads``, ``num_key_value_heads`` where it has such,
    the layout's ``channels_key``, ``o_proj_bias`` and ``down_proj_bias``."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    sequence_classification: type[PreTrainedModel]
    token_classification: type[PreTrainedModel]
    switches: Callable[[PreTrainedConfig, Collection[str]], dict[str, object]] = lambda _config, _names: {}

    @property
    def code(self) -> Path:
        """The modelling file."""
        return Path(str(sys.modules[self.config.__module__].__file__))

    @property
    def models(self) -> dict[str, type[PreTrainedModel]]:
        """The models' classes by the name of the Auto class that finds them."""
        return {
            "AutoModel": self.model,
            "AutoModelForCausalLM": self.causal_lm,
            "AutoModelForSequenceClassification": self.sequence_classification,
            "AutoModelForTokenClassification": self.token_classification,
        }

    @property
    def auto_map(self) -> dict[str, str]:
        return {auto: f"{self.code.stem}.{cls.__name__}" for auto, cls in {"AutoConfig": self.config, **self.models}.items()}

    @property
    def has_kv_heads(self) -> bool:
        return "num_key_value_heads" in own_fields(self.config)


def own_fields(config: type[PreTrainedConfig]) -> set[str]:
    """The fields of a family's config beyond those that all configs have."""
    return {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)}


def _llama_switches(config: PreTrainedConfig, names: Collection[str]) -> dict[str, object]:
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    llama = config.model_type == "llama"  # ignores a sliding window even where its config has one
    return {
        "attention_bias": attention + "q_proj.bias" in names,
        "mlp_bias": mlp + "gate_proj.bias" in names,
        "qk_norm": attention + "q_norm.weight" in names,
        "sliding_window": None if llama else getattr(config, "sliding_window", None),
        "layer_types": None if llama else getattr(config, "layer_types", None),
    }


_LLAMA = ModelingFile(
    llama.SelfPrunerConfig,
    llama.SelfPrunerModel,
    llama.SelfPrunerForCausalLM,
    llama.SelfPrunerForSequenceClassification,
    llama.SelfPrunerForTokenClassification,
    _llama_switches,
)
MODELING_FILES: Mapping[str, ModelingFile] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gemma2": ModelingFile(
        gemma.SelfPrunerGemma2Config,
        gemma.SelfPrunerGemma2Model,
        gemma.SelfPrunerGemma2ForCausalLM,
        gemma.SelfPrunerGemma2ForSequenceClassification,
        gemma.SelfPrunerGemma2ForTokenClassification,
    ),
    "gemma3_text": ModelingFile(
        gemma.SelfPrunerGemma3Config,
        gemma.SelfPrunerGemma3Model,
        gemma.SelfPrunerGemma3ForCausalLM,
        gemma.SelfPrunerGemma3ForSequenceClassification,
        gemma.SelfPrunerGemma3ForTokenClassification,
    ),
    "phi3": ModelingFile(
        phi3.SelfPrunerPhi3Config,
        phi3.SelfPrunerPhi3Model,
        phi3.SelfPrunerPhi3ForCausalLM,
        phi3.SelfPrunerPhi3ForSequenceClassification,
        phi3.SelfPrunerPhi3ForTokenClassification,
    ),
    "opt": ModelingFile(
        opt.SelfPrunerOPTConfig,
        opt.SelfPrunerOPTModel,
        opt.SelfPrunerOPTForCausalLM,
        opt.SelfPrunerOPTForSequenceClassification,
        opt.SelfPrunerOPTForTokenClassification,
    ),
}


def modeling_file_of(config: PreTrainedConfig) -> ModelingFile:
    return MODELING_FILES[family_of(config)]
