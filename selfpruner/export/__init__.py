"""Checkpoints out: the pruned model as a folder that loads where models are served.

Importing this package registers the model's classes with transformers' Auto classes, so that a checkpoint loads without
remote code wherever selfpruner is installed.
"""

from __future__ import annotations

from transformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM

from selfpruner.export.modeling_selfpruner import SelfPrunerConfig, SelfPrunerForCausalLM, SelfPrunerModel

AutoConfig.register(SelfPrunerConfig.model_type, SelfPrunerConfig, exist_ok=True)
AutoModel.register(SelfPrunerConfig, SelfPrunerModel, exist_ok=True)
AutoModelForCausalLM.register(SelfPrunerConfig, SelfPrunerForCausalLM, exist_ok=True)
