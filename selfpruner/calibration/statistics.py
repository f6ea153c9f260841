"""Activation statistics of the dense model, streamed layer by layer.

One pass over the calibration tokens: the residual stream of all sequences is held for one layer at a time, the inputs of
o_proj and down_proj are accumulated and forgotten. Accumulators are float64 (float32 where the device has no float64);
mean and scatter are merged batch by batch after Chan, Golub and LeVeque (the batched form of Welford's update).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from selfpruner.architectures import Architecture
from selfpruner.errors import CancelledTaskError

# Tokens that pass a layer at once: enough to fill two cores or a GPU, small enough that F-wide activations stay a few MB.
TOKENS_PER_STEP = 4096


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Moments of the inputs x (tokens, n) of one output matrix.

    ``mean`` (n,), ``variance`` (n,) unbiased over tokens, ``energy`` (n,) = sum of x^2 over tokens, ``gram`` (n, n) = X^T X;
    ``tokens`` and ``sequences`` counted. float64 where the device has it.
    """

    tokens: int
    sequences: int
    mean: Tensor
    variance: Tensor
    energy: Tensor
    gram: Tensor

    @property
    def norm(self) -> Tensor:
        """sqrt(q) of criteria.md: input norm over sqrt(number of sequences), (n,)."""
        return (self.energy / self.sequences).sqrt()


class Accumulator:
    """Builds :class:`BlockStatistics` from batches of rows."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.tokens = 0
        self.sequences = 0
        self.mean = torch.zeros(width, dtype=self.dtype, device=device)
        self.scatter = torch.zeros(width, width, dtype=self.dtype, device=device)  # sum of (x - mean)(x - mean)^T

    def add(self, x: Tensor) -> None:
        """Add inputs (sequences, length, n)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        count = rows.shape[0]
        # Centred on the batch mean before squaring: float32 products of centred rows keep their digits.
        mean = rows.mean(0, dtype=self.dtype)
        centred = rows - mean.float()
        total = self.tokens + count
        delta = mean - self.mean
        self.scatter += centred.T @ centred
        self.scatter.addr_(delta, delta, alpha=self.tokens * count / total)
        self.mean += delta * (count / total)
        self.tokens, self.sequences = total, self.sequences + x.shape[0]

    def finish(self) -> BlockStatistics:
        """The statistics of what was added. To be called once: the scatter becomes the Gram matrix in place."""
        variance = self.scatter.diagonal() / max(self.tokens - 1, 1)
        gram = self.scatter.addr_(self.mean, self.mean, alpha=self.tokens)
        return BlockStatistics(self.tokens, self.sequences, self.mean, variance, gram.diagonal().clone(), gram)


def layer_statistics(
    arch: Architecture,
    tokens: Tensor,
    *,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[BlockStatistics, BlockStatistics]]:
    """Yield (attention, ffn) statistics of each layer in turn for token ids (sequences, length).

    Channels are those of the checkpoint, in its order, whatever order the model's are in. Only one layer's statistics exist at a
    time unless the caller keeps them. Raises CancelledTaskError between layers.
    """
    length = tokens.shape[1]
    rope = arch.rope(length)
    step = max(1, TOKENS_PER_STEP // length)
    with torch.no_grad():
        x = torch.cat([arch.embed(part.to(arch.device)) for part in tokens.split(step)])
        for layer in range(arch.layers):
            if cancelled():
                raise CancelledTaskError("Cancelled while collecting statistics.")
            a, f = arch.attention(layer), arch.checkpoint_ffn(layer)
            attention, ffn = Accumulator(a.o.shape[1], arch.device), Accumulator(f.down.shape[1], arch.device)
            for part in x.split(step):  # views: the residual stream is updated in place
                z = arch.attention_inputs(layer, part, a, rope)
                attention.add(z)
                part += torch.nn.functional.linear(z, a.o, a.o_bias).float()
                z = arch.ffn_inputs(layer, part, f)
                ffn.add(z)
                part += torch.nn.functional.linear(z, f.down, f.down_bias).float()
            progress(f"statistics of layer {layer + 1}/{arch.layers}")
            yield attention.finish(), ffn.finish()
