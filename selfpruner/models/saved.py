"""Folders of pruned models: a checkpoint as it was exported, or a model saved from one afterwards. Imports no torch.

A checkpoint has a manifest, against which every file is checked. A model that was trained further and saved (a merged adapter, a
Trainer, ``save_pretrained``) has none: its config.json says what it is, and the headers of its files whether they are whole. If its
layers have one shape it is an ordinary model of its family and read like any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from selfpruner.errors import ModelError, UnsupportedModelError
from selfpruner.files import manifest
from selfpruner.models import checks, sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORM = "selfpruner"  # what the model types of the modelling files begin with


def is_pruned(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint, or a pruned model that was saved later and is none of an ordinary family."""
    return (folder / manifest.NAME).is_file() or (is_saved(folder) and str(_model_type(folder)).startswith(FORM))


def is_saved(folder: Path) -> bool:
    """Whether ``folder`` holds a model that no export wrote. Its plan.json would say that one did, and did not finish."""
    known = (folder / manifest.NAME).exists() or (folder / "plan.json").exists()
    return (folder / "config.json").is_file() and not known


def check(folder: Path) -> None:
    """Compare a checkpoint with its manifest; of what was saved later read every header. Raises as :func:`manifest.check`, or a
    ModelError for weights that are not whole, not safetensors, or no numbers."""
    if not is_saved(folder):
        manifest.check(folder)
    elif not is_pruned(folder):
        checks.check_folder(folder)
    else:
        config = checks.read_json(folder / "config.json", "The model configuration")
        if config.get("quantization_config"):
            raise UnsupportedModelError(
                f"{folder} holds quantised weights (quantization_config in config.json). Save it in float32, float16 or bfloat16.",
                param="model",
            )
        for file in checks.weight_files(folder):
            checks.read_header(file)


def precheck(name: str) -> None:
    """Raise what can be known at once of a model or checkpoint that will be measured: :func:`selfpruner.models.precheck`."""
    if is_pruned(Path(name)):
        if not is_saved(Path(name)):
            manifest.read(Path(name))
    else:
        sources.precheck(name)


def parameters(folder: Path, model: PreTrainedModel) -> int:
    """Of a model from ``folder``, tied ones once; of a checkpoint without the zeros of its pattern."""
    if (folder / manifest.NAME).is_file():
        return manifest.kept(manifest.read(folder)["plan"])
    return sum(parameter.numel() for parameter in model.parameters())


def fingerprint(folder: Path) -> str:
    """Identity of the content, wherever it lies."""
    listed = folder / manifest.NAME
    return manifest.sha256(listed) if listed.is_file() else checks.fingerprint(folder)


def _model_type(folder: Path) -> object:
    try:
        body = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return body.get("model_type") if isinstance(body, dict) else None


def not_whole(folder: Path, what: str) -> ModelError:
    """The error for weights that do not fit their config.json."""
    return ModelError(
        f"{folder} cannot be loaded: {what}. "
        + (
            "Adapters have to be merged before a model is saved (merge_and_unload, then save_pretrained). Copy or save it again."
            if is_saved(folder)
            else "Export it again with what is installed here."
        ),
        param="model",
    )
