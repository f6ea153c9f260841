"""How fast models run on this device: tokens per second of reading a prompt and of writing after it.

Models are timed in turn, round after round, so that a machine whose speed drifts slows all of them; the median round counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from selfpruner.errors import CancelledTaskError


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second at batch 1: ``prefill`` over the prompt, ``decode`` with the cache, greedy; None where nothing was
    written."""

    prefill: float
    decode: float | None

    @property
    def figures(self) -> dict[str, float]:
        """As a report has them."""
        found = {"prefill_tps": self.prefill, "decode_tps": self.decode}
        return {name: round(value, 1) for name, value in found.items() if value is not None}


def measure(
    models: Mapping[str, PreTrainedModel],
    prompt: Tensor,
    *,
    new_tokens: int = 32,
    rounds: int = 3,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Speed]:
    """Time each model on ``prompt`` (length,) after one warm-up round. Raises CancelledTaskError between models."""
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            if cancelled():
                raise CancelledTaskError("Cancelled while measuring speed.")
            first, rest = _once(model, prompt.to(model.device)[None], new_tokens if round_ else min(new_tokens, 4))
            if round_:
                prefill[name].append(prompt.numel() / first)
                decode[name].append(new_tokens / rest)
    return {
        name: Speed(statistics.median(prefill[name]), statistics.median(decode[name]) if new_tokens else None) for name in models
    }


def _once(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of reading the prompt, and of writing ``new_tokens`` after it."""
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        wait(model.device)
        started = time.perf_counter()
        step = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        wait(model.device)
        read = time.perf_counter()
        for _ in range(new_tokens):
            step = model(input_ids=step.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True, logits_to_keep=1)
        wait(model.device)
        return read - started, time.perf_counter() - read


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
