"""Checkpoints out: the pruned model as a folder that loads where models are served.

Importing this package registers the models' classes with transformers' Auto classes, so that a checkpoint loads without
remote code wherever selfpruner is installed.
"""

from __future__ import annotations

from transformers.models.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from selfpruner.export.forms import FORMS

for _form in FORMS.values():
    AutoConfig.register(str(_form.config.model_type), _form.config, exist_ok=True)
    AutoModel.register(_form.config, _form.model, exist_ok=True)
    AutoModelForCausalLM.register(_form.config, _form.causal_lm, exist_ok=True)
    AutoModelForSequenceClassification.register(_form.config, _form.sequence_classification, exist_ok=True)
    AutoModelForTokenClassification.register(_form.config, _form.token_classification, exist_ok=True)
