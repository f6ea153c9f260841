"""Activation statistics of the dense model, streamed layer by layer.

One pass over the calibration tokens: the residual stream of all sequences is held for one layer at a time, and the inputs of its
matrices are accumulated and forgotten. Accumulators are float64 (float32 where the device has no float64). Mean and scatter are
merged batch by batch after Chan, Golub and LeVeque (the batched form of Welford's update).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Literal

import torch
from torch import Tensor

from selfpruner.architectures import Architecture
from selfpruner.architectures.order import checkpoint_ffn
from selfpruner.calibration.soundness import finite, not_finite
from selfpruner.errors import CancelledTaskError, disk_errors
from selfpruner.files.tensors import tensor_bytes

Site = Literal["qkv", "attention", "gate_up", "ffn"]
"""Where inputs are looked at: before q, k and v; before o; before gate and up; before down. What cuts units needs those of the
output matrices (:data:`OUTPUTS`), what zeroes weights all."""
OUTPUTS: tuple[Site, ...] = ("attention", "ffn")
SITES: tuple[Site, ...] = ("qkv", "attention", "gate_up", "ffn")
_READERS: Mapping[Site, str] = {"qkv": "q, k and v", "attention": "o", "gate_up": "gate and up", "ffn": "down"}

# Tokens that pass a layer at once: enough to fill two cores or a GPU, small enough that F-wide activations stay a few MB.
TOKENS_PER_STEP = 2048
# Rows of a scatter matrix that are updated at once; only what is on the diagonal and right of it is.
STRIP = 128
# One in so many sequences also judges what is fitted to the others.
JUDGES = 4


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of inputs x (tokens, n): ``mean`` (n,) and ``scatter`` (n, n), the sum of (x - mean)(x - mean)^T."""

    tokens: int
    mean: Tensor
    scatter: Tensor


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Moments of the inputs x (tokens, n) of one output matrix.

    ``mean`` (n,), ``variance`` (n,) unbiased over tokens, ``energy`` (n,) = sum of x^2 over tokens, ``scatter`` (n, n) = the sum
    of (x - mean)(x - mean)^T; ``tokens`` and ``sequences`` counted. float64 where the device has it; a scatter read from disk is
    float32 and lies in a mapped file. ``judge`` are the moments, in float32, of every ``JUDGES``-th
    sequence; those sequences count in the other moments too. None where there are too few, and at inputs of other matrices.
    """

    tokens: int
    sequences: int
    mean: Tensor
    variance: Tensor
    energy: Tensor
    scatter: Tensor
    judge: Moments | None = None

    @property
    def norm(self) -> Tensor:
        """sqrt(q) of criteria.md: input norm over sqrt(number of sequences), (n,)."""
        return (self.energy / self.sequences).sqrt()

    @property
    def gram(self) -> Tensor:
        """X^T X (n, n), made anew whenever it is asked for."""
        return self.scatter.to(self.mean.dtype, copy=True).addr_(self.mean, self.mean, alpha=self.tokens)

    def without_judge(self) -> Moments:
        """The moments of the sequences that do not judge; of all of them where none does. In the scatter's dtype."""
        if self.judge is None:
            return Moments(self.tokens, self.mean, self.scatter)
        count = self.tokens - self.judge.tokens
        theirs = self.judge.mean.to(self.mean)
        mean = (self.mean * self.tokens - theirs * self.judge.tokens) / count
        scatter, between = self.scatter - self.judge.scatter, (theirs - mean).to(self.scatter)
        scatter.addr_(between, between, alpha=-self.judge.tokens * count / self.tokens)
        return Moments(count, mean, scatter)


def mirror(upper: Tensor) -> Tensor:
    """The symmetric matrix (n, n) whose upper triangle this is, in its memory."""
    for start in range(0, len(upper), STRIP):
        stop = min(start + STRIP, len(upper))
        own = upper[start:stop, start:stop]
        own.copy_(own.triu() + own.triu(1).T)
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper


class Accumulator:
    """Builds :class:`BlockStatistics` from batches of rows. ``scatter`` is the dtype in which products are added up, by default
    float64 where the device has it."""

    def __init__(self, width: int, device: torch.device, scatter: torch.dtype | None = None) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.tokens = 0
        self.sequences = 0
        self.mean = torch.zeros(width, dtype=self.dtype, device=device)
        self.scatter = torch.zeros(width, width, dtype=scatter or self.dtype, device=device)  # sum of (x - mean)(x - mean)^T

    def add(self, x: Tensor) -> None:
        """Add inputs (sequences, length, n)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        count = rows.shape[0]
        # Centred on the batch mean before squaring: float32 products of centred rows keep their digits.
        mean = rows.mean(0, dtype=self.dtype)
        centred = rows - mean.float()
        del rows
        total = self.tokens + count
        delta = mean - self.mean
        between = delta.to(self.scatter)
        for start in range(0, x.shape[-1], STRIP):  # the products never exist whole, and each of them once
            strip, rest = slice(start, start + STRIP), slice(start, None)
            part = self.scatter[strip, rest]
            part += centred[:, strip].T @ centred[:, rest]
            part.addr_(between[strip], between[rest], alpha=self.tokens * count / total)
        self.mean += delta * (count / total)
        self.tokens, self.sequences = total, self.sequences + x.shape[0]

    def finish(self, judge: Moments | None = None) -> BlockStatistics:
        """The statistics of what was added. To be called once: the scatter is theirs."""
        mirror(self.scatter)
        own = self.scatter.diagonal().to(self.dtype)
        variance, energy = own / max(self.tokens - 1, 1), own + self.tokens * self.mean.square()
        return BlockStatistics(self.tokens, self.sequences, self.mean, variance, energy, self.scatter, judge)


class _Site:
    """The sums at one place of a layer: over all sequences, and again over those that judge."""

    def __init__(self, width: int, device: torch.device, *, judged: bool) -> None:
        self.all = Accumulator(width, device)
        # What judges is kept in float32, so it is added up in float32.
        self.judge = Accumulator(width, device, torch.float32) if judged else None

    def add(self, z: Tensor, judging: list[int]) -> None:
        """Inputs (sequences, length, n) and which of the sequences judge."""
        self.all.add(z)
        if self.judge is not None and judging:
            self.judge.add(z[judging])

    def finish(self) -> BlockStatistics:
        own = self.judge
        return self.all.finish(None if own is None else Moments(own.tokens, own.mean.float(), own.scatter))


def layer_statistics(
    arch: Architecture,
    tokens: Tensor,
    sites: Collection[Site] = OUTPUTS,
    *,
    memory: int | None = None,
    scratch: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[dict[Site, BlockStatistics]]:
    """Yield the statistics of each layer in turn at ``sites`` for token ids (sequences, length).

    With ``memory`` (bytes) fewer tokens pass at once, and where the residual stream takes more than an eighth of it, that is kept
    in a file in the folder ``scratch``. Channels are those of the checkpoint, in its order, whatever order the model's are in.
    Only one layer's statistics exist at a time unless the caller keeps them. Raises CancelledTaskError between layers, and
    CalibrationError where the model computes NaN or infinity.
    """
    length = tokens.shape[1]
    rope = arch.rope(length)
    step = max(1, _tokens_at_once(arch, memory) // length)
    size = tokens.numel() * arch.hidden * 4
    with torch.no_grad(), disk_errors(scratch or ""), stream_file(size, memory, scratch) as file:
        stream = Stream(file)
        for sequences in tokens.split(step):
            stream.add(arch.embed(sequences.to(arch.device)))
        for layer in range(arch.layers):
            if cancelled():
                raise CancelledTaskError("Cancelled while collecting statistics.")
            a, f = arch.attention(layer), checkpoint_ffn(arch, layer)
            widths = {"qkv": arch.hidden, "attention": a.o.shape[1], "gate_up": arch.hidden, "ffn": f.down.shape[1]}
            judged = OUTPUTS if len(tokens) >= JUDGES else ()  # only output matrices are fitted
            seen = {site: _Site(widths[site], arch.device, judged=site in judged) for site in SITES if site in sites}
            first, broken = 0, False
            for index in range(stream.parts):
                part = stream.take(index, arch.device)
                judging = [place for place in range(len(part)) if (first + place) % JUDGES == JUDGES - 1]
                first += len(part)
                if "qkv" in seen:
                    seen["qkv"].add(arch.attention_norm(layer, part).to(arch.dtype), judging)
                z = arch.attention_inputs(layer, part, a, rope)
                if "attention" in seen:
                    seen["attention"].add(z, judging)
                part += arch.attention_output(layer, z, a).float()
                if "gate_up" in seen:
                    seen["gate_up"].add(arch.ffn_norm(layer, part).to(arch.dtype), judging)
                z = arch.ffn_inputs(layer, part, f)
                if "ffn" in seen:
                    seen["ffn"].add(z, judging)
                part += arch.ffn_output(layer, z, f).float()
                stream.put(index, part)
                broken = broken or not finite(part)
            done = [{site: sums.finish() for site, sums in seen.items()}]
            check_finite(arch, layer, done[0])
            if broken:
                raise not_finite(arch.model, "The outputs of down", layer)
            progress(f"statistics of layer {layer + 1}/{arch.layers}")
            del a, f, seen, part, z
            yield done.pop()  # nothing of it is held here while the caller works with it


def check_finite(arch: Architecture, layer: int, found: Mapping[Site, BlockStatistics]) -> None:
    """Raise CalibrationError where inputs were no numbers, or too large to be squared: nothing can be made of them."""
    for site, stats in found.items():
        if not (finite(stats.mean) and finite(stats.energy)):
            raise not_finite(arch.model, f"The inputs of {_READERS[site]}", layer)


def _tokens_at_once(arch: Architecture, memory: int | None) -> int:
    """A token's work in a layer keeps about twenty bytes per FFN channel alive at once; an eighth of the memory is for that."""
    return TOKENS_PER_STEP if memory is None else max(1, min(TOKENS_PER_STEP, memory // 8 // (20 * arch.channels)))


class Stream:
    """The residual streams of all sequences, a part at a time: tensors that are changed in place, or a file."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file
        self._parts: list[Tensor] = []  # with a file only their shapes count
        self._offsets = [0]

    @property
    def parts(self) -> int:
        return len(self._parts)

    def add(self, part: Tensor) -> None:
        self._parts.append(part if self._file is None else torch.empty(part.shape, device="meta"))
        self._offsets.append(self._offsets[-1] + part.nbytes)
        self.put(self.parts - 1, part)

    def take(self, index: int, device: torch.device) -> Tensor:
        if self._file is None:
            return self._parts[index]
        part = torch.empty(self._parts[index].shape)
        os.preadv(self._file.fileno(), [tensor_bytes(part)], self._offsets[index])
        return part.to(device)

    def put(self, index: int, part: Tensor) -> None:
        """Keep what was taken and changed, or what takes its place."""
        if self._file is None:
            self._parts[index] = part
        else:
            os.pwrite(self._file.fileno(), tensor_bytes(part.cpu()), self._offsets[index])


def stream_file(size: int, memory: int | None, scratch: Path | None) -> AbstractContextManager[IO[bytes] | None]:
    if memory is None or scratch is None or size * 8 <= memory:
        return nullcontext()
    scratch.mkdir(parents=True, exist_ok=True)
    return TemporaryFile(dir=scratch, buffering=0)
