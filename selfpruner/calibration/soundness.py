"""NaN and infinity: where they turn up, what the error says about them, and which weights they come from."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from selfpruner.errors import CalibrationError, ModelError


def finite(x: Tensor) -> bool:
    """Whether all of x are numbers, in one pass that makes nothing of its size."""
    return not x.numel() or all(bool(end.isfinite()) for end in x.detach().aminmax())


def advice(model: PreTrainedModel) -> str:
    """What to do about a model that computes NaN or infinity: name the weight that holds one itself, among those in memory."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not finite(parameter):
            return f"{name} holds NaN or infinity: download the model again, or repeat the merge that made it."
    return "Load the model in float32 or bfloat16, or use another text."


def not_finite(model: PreTrainedModel, what: str, layer: int | None = None) -> CalibrationError:
    """``what`` (the inputs of something) were found to be no numbers while ``model`` read the calibration text."""
    where = "" if layer is None else f" (layer {layer})"
    return CalibrationError(f"{what} are not finite on the calibration text{where}. {advice(model)}")


def not_numbers(model: PreTrainedModel) -> ModelError:
    """``model`` is to be judged, and cannot be."""
    return ModelError(f"The model computes values that are not numbers; it cannot be judged. {advice(model)}", param="model")
