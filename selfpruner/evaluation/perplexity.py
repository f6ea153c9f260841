"""Perplexity of any causal model, and its divergence from a reference, by plain forward passes. No engine, no plan.

What ``evaluate`` reports about a checkpoint; the same figures as the engine's, by an independent way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.engine import Score


def score(
    model: PreTrainedModel,
    tokens: Tensor,
    reference: PreTrainedModel | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Score:
    """Mean NLL, and KL(reference || model) per token, on token ids (sequences, length). ``kl`` is NaN without a reference."""
    kl, nll = 0.0, 0.0
    sequences, length = tokens.shape
    with torch.no_grad():
        for index, row in enumerate(tokens):
            if cancelled():
                raise CancelledTaskError("Cancelled during an evaluation.")
            ids = row[None].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            other = None if reference is None else reference(input_ids=ids, use_cache=False).logits[0].float()
            target = ids[0, 1:]
            for start in range(0, length, 128):
                part = slice(start, start + 128)
                q = logits[part].log_softmax(-1)
                wanted = target[part]
                nll -= float(q[: wanted.numel()].gather(1, wanted[:, None]).double().sum())
                if other is not None:
                    p = other[part].log_softmax(-1)
                    kl += float((p.exp() * (p - q)).sum(-1).double().sum())
            progress(f"sequence {index + 1}/{sequences}")
    return Score(kl / tokens.numel() if reference is not None else float("nan"), nll / (sequences * (length - 1)), tokens.numel())
