"""Cut models written out, and what they and their dense twins compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import AutoTokenizer

from selfpruner.export.checkpoint import write
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.files.card_info import CardInfo
from selfpruner.testing.cut_models import CARD, Case, masked_dense, units_of


def masked_logits(case: Case, tokens: Tensor) -> Tensor:
    with torch.inference_mode(), masked_dense(case):
        logits: Tensor = case.dense(tokens, use_cache=False).logits
    return logits


def greedy(model: PreTrainedModel, tokens: Tensor, **how: Any) -> list[list[int]]:
    mask = how.pop("attention_mask", torch.ones_like(tokens))
    # Never stopping early, so that the cache is used at every step.
    out = model.generate(tokens, attention_mask=mask, min_new_tokens=8, max_new_tokens=8, do_sample=False, **how)
    return out[:, tokens.shape[1] :].tolist()


# Families whose pruned models have a modelling file of their own.
OWN_FORMS = tuple(family for family, form in MODELING_FILES.items() if form is not MODELING_FILES["llama"])


def written(root: Path, case: Case, source: Path, card: CardInfo = CARD) -> Path:
    return write(case.pruned, AutoTokenizer.from_pretrained(source), source, root / "checkpoint", card, units=units_of(case)).path
