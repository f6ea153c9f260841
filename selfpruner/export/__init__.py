"""Checkpoints out: the pruned model as a folder that loads where models are served.

Importing this package registers the models' classes with transformers' Auto classes, so that a checkpoint loads without
remote code wherever selfpruner is installed.
"""

from __future__ import annotations

import transformers

from selfpruner.export.modeling_files import MODELING_FILES

_auto = transformers
for _form in MODELING_FILES.values():
    _auto.AutoConfig.register(str(_form.config.model_type), _form.config, exist_ok=True)
    # Registered by their own names, so that a model saved from here brings its modelling file along, like one that was loaded with
    # the folder's own code.
    _form.config.register_for_auto_class()
    for _name, _model in _form.models.items():
        getattr(_auto, _name).register(_form.config, _model, exist_ok=True)
        _model.register_for_auto_class(_name)
