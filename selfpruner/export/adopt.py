"""A checkpoint, with proof and manifest, of a model that was saved outside of an export, for instance after further training.

What its folder does not say stays unknown: the plan, what was removed, and which units were kept. Every format starts from it as
from any other checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from selfpruner.export.build import build, shapes_of
from selfpruner.export.checkpoint import opened, write
from selfpruner.export.folder import Exported
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.files.card_info import CardInfo
from selfpruner.models import saved


def adopt(source: Path, directory: Path, *, cancelled: Callable[[], bool] = lambda: False) -> Exported:
    """Write the model in ``source``, pruned or ordinary, as a checkpoint to ``directory``, in the type that it is stored in.

    Raises ModelError and its kin for what cannot be loaded, and what :func:`selfpruner.export.checkpoint.write` raises.
    """
    held = opened(source, torch.device("cpu"))
    model = held.model
    if type(model) not in {form.causal_lm for form in MODELING_FILES.values()}:
        model = build(model, shapes_of(model.config), {})
    card = CardInfo(base_model=source.resolve().name, rate=None, made_from={"model": saved.fingerprint(source)[:16]})
    return write(model, held.tokenizer, source, directory, card, cancelled=cancelled)
