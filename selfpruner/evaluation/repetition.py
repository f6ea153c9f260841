"""How much a model repeats itself when it writes: pruning too much here and there shows as loops before it shows in the KL.

Greedy continuations of a few prompts, side by side in one batch with a cache. The rate is the share of a continuation's runs of
four tokens that it has had before (seq-rep-4: Welleck et al. 2020, arXiv 1908.04319, section 6), 0 for none; what follows an end of
text does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from selfpruner.errors import CancelledTaskError

RUN = 4


def repetition(
    model: PreTrainedModel, prompts: Tensor, *, new_tokens: int = 48, cancelled: Callable[[], bool] = lambda: False
) -> float:
    """Mean rate over the continuations of ``prompts`` (count, length) by ``new_tokens`` tokens each.

    Raises CancelledTaskError between tokens.
    """
    found = [repeated(tokens) for tokens in continuations(model, prompts, new_tokens, cancelled)]
    return sum(found) / len(found)


def repeated(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that occurred before: 1 - distinct / all. 0 where there is none."""
    runs = [tuple(tokens[start : start + RUN]) for start in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@torch.inference_mode()
def continuations(
    model: PreTrainedModel, prompts: Tensor, new_tokens: int, cancelled: Callable[[], bool] = lambda: False
) -> list[list[int]]:
    """What the model writes after each prompt, always the likeliest token, up to its end of text."""
    cache = DynamicCache(config=model.config)
    ids, written = prompts.to(model.device), []
    for _ in range(new_tokens):
        if cancelled():
            raise CancelledTaskError("Cancelled while writing.")
        step = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = step.logits[:, -1:].argmax(-1)
        written.append(ids)
    ends = _ends(model)
    texts = torch.cat(written, 1).tolist()
    return [text[: next((place for place, token in enumerate(text) if token in ends), None)] for text in texts]


def _ends(model: PreTrainedModel) -> set[int]:
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set() if found is None else {found} if isinstance(found, int) else set(found)
