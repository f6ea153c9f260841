"""Perplexity of any causal model, and its divergence from a reference, by plain forward passes. No engine, no plan.

``evaluate`` reports these figures about a checkpoint; they are the engine's figures, computed independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner.calibration.soundness import not_numbers
from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.tally import Score

# Positions whose logits are float32 at a time; on a CPU as few as its caches hold.
_CHUNK = {"cpu": 16}
_CHUNK_ELSEWHERE = 128


def score(
    model: PreTrainedModel,
    tokens: Tensor,
    reference: PreTrainedModel | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Score:
    """Mean NLL, and KL(reference || model) per token, on token ids (sequences, length). ``kl`` is NaN without a reference. Raises
    ModelError where a model computes NaN or infinity."""
    kl, nll = 0.0, 0.0
    sequences, length = tokens.shape
    for index, row in enumerate(tokens):
        if cancelled():
            raise CancelledTaskError("Cancelled during an evaluation.")
        more_kl, more_nll = _sums(model, row, reference)
        kl, nll = kl + more_kl, nll + more_nll
        if not (math.isfinite(kl) and math.isfinite(nll)):
            raise not_numbers(model)
        progress(f"sequence {index + 1}/{sequences}")
    return Score(kl / tokens.numel() if reference is not None else float("nan"), nll / (sequences * (length - 1)), tokens.numel())


def losses(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Mean NLL in nats of every sequence of ``tokens`` (sequences, length), over its length - 1 tokens that have one before."""
    per_batch = []
    sequences, length = tokens.shape
    for index, row in enumerate(tokens):
        if cancelled():
            raise CancelledTaskError("Cancelled during an evaluation.")
        per_batch.append(_sums(model, row, None)[1] / (length - 1))
        progress(f"window {index + 1}/{sequences}")
    return per_batch


@torch.inference_mode()
def _sums(model: PreTrainedModel, row: Tensor, reference: PreTrainedModel | None) -> tuple[float, float]:
    """(KL, NLL) in nats, summed over a sequence of token ids (length,). KL is 0 without a reference."""
    kl, nll = 0.0, 0.0
    ids = row[None].to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    other = None if reference is None else reference(input_ids=ids, use_cache=False).logits[0]
    target = ids[0, 1:]
    chunk = _CHUNK.get(model.device.type, _CHUNK_ELSEWHERE)
    for start in range(0, row.numel(), chunk):
        part = slice(start, start + chunk)
        q = logits[part].float().log_softmax(-1)
        wanted = target[part]
        nll -= float(q[: wanted.numel()].gather(1, wanted[:, None]).double().sum())
        if other is not None:
            p = other[part].float().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(-1).double().sum())
    return kl, nll
