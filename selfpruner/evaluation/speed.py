"""How fast models run on this device: tokens per second of reading a prompt and of writing after it.

Models are timed in turn, round after round, so a machine whose speed drifts slows all of them. The median round counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

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
        rates = {"prefill_tps": self.prefill, "decode_tps": self.decode}
        return {name: round(value, 1) for name, value in rates.items() if value is not None}


class Scored(Protocol):
    """What a forward pass of a language model gives."""

    logits: Tensor


@dataclass(frozen=True, slots=True)
class Read:
    """A prompt that was read: its ``cache``, the ``token`` (batch, 1) that follows, and seconds until the logits were there and
    until the token was known here."""

    cache: Cache
    token: Tensor
    seconds: float
    first_token: float


def fitting(prompt: int, new_tokens: int, positions: int) -> tuple[int, int]:
    """As many tokens to read and to write after them as a model of so many ``positions`` can, the writing first, up to half."""
    new_tokens = min(new_tokens, positions // 2)
    return max(min(prompt, positions - new_tokens), 1), new_tokens


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
            seen = read(model, prompt.to(model.device)[None])
            seconds = write(model, seen.cache, seen.token, new_tokens if round_ else min(new_tokens, 4))
            if round_:
                prefill[name].append(prompt.numel() / seen.seconds)
                decode[name].append(new_tokens / seconds)
    return {
        name: Speed(statistics.median(prefill[name]), statistics.median(decode[name]) if new_tokens else None) for name in models
    }


def read(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> Read:
    """Read ``ids`` (batch, length) into ``cache``, a new growing one by default; logits of the last position only."""
    with _plain_head(model), torch.inference_mode():
        cache = DynamicCache(config=model.config) if cache is None else cache
        wait(model.device)
        started = time.perf_counter()
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        wait(model.device)
        seconds = time.perf_counter() - started
        token = logits[:, -1:].argmax(-1)
        token.cpu()
        return Read(cache, token, seconds, time.perf_counter() - started)


def write(model: PreTrainedModel, cache: Cache, token: Tensor, new_tokens: int, step: Callable[..., Scored] | None = None) -> float:
    """Seconds of writing ``new_tokens`` greedily after ``token`` (batch, 1). ``step`` is the model's forward pass in another form,
    compiled say."""
    step = model if step is None else step
    with torch.inference_mode():
        wait(model.device)
        started = time.perf_counter()
        for _ in range(new_tokens):
            token = step(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        wait(model.device)
        return time.perf_counter() - started


@contextmanager
def _plain_head(model: PreTrainedModel) -> Iterator[None]:
    """The head as transformers loads it, with gradients allowed.

    torch multiplies the last position of a prompt, a slice, with a weight that allows none as a batched product, for which it
    copies the whole weight in the 16-bit types: a third of the time of 128 tokens at 135M.
    """
    head: Tensor = model.get_output_embeddings().weight
    before = head.requires_grad
    head.requires_grad_(True)
    try:
        yield
    finally:
        head.requires_grad_(before)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
