"""Activation statistics of the dense model, streamed layer by layer.

One pass over the calibration tokens: the residual stream of all sequences is held for one layer at a time, and the inputs of its
matrices are accumulated and forgotten. Sums over single inputs are float64 (float32 where the device has no float64), scatter
matrices float32. Those of the sequences that judge and of the others are summed apart and merged, after Chan, Golub and LeVeque.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
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
STRIP = 256
# Rows so many times as large as the median one have products of their own.
LARGE = 4.0
# Rows whose columns are summed at once on a CPU.
SUMMED = 128
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
    of (x - mean)(x - mean)^T; ``tokens`` and ``sequences`` counted. The scatter is float32, all else float64 where the device has
    it. ``judge`` are the moments, in float32, of every ``JUDGES``-th sequence; those sequences count in the other moments too. None
    where there are too few, and at inputs of other matrices.
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

    def without_judge(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Moments:
        """The moments of the sequences that do not judge; of all of them where none does. Of the scatter only ``rows`` and
        ``columns``, where they are given."""
        if self.judge is None:
            return Moments(self.tokens, self.mean, _part(self.scatter, rows, columns))
        count = self.tokens - self.judge.tokens
        theirs = self.judge.mean.to(self.mean)
        mean = (self.mean * self.tokens - theirs * self.judge.tokens) / count
        scatter = _part(self.scatter, rows, columns).sub_(_part(self.judge.scatter, rows, columns))
        between = (theirs - mean).to(scatter)
        one, other = (between if some is None else between[some] for some in (rows, columns))
        return Moments(count, mean, scatter.addr_(one, other, alpha=-self.judge.tokens * count / self.tokens))


def _part(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A copy of some rows and columns; the rows by strips, so that no other large matrix exists."""
    if rows is None or columns is None:
        return matrix.clone()
    part = matrix.new_empty(len(rows), len(columns))
    for start in range(0, len(rows), STRIP):
        part[start : start + STRIP] = matrix[rows[start : start + STRIP]].index_select(1, columns)
    return part


def mirror(upper: Tensor) -> Tensor:
    """The symmetric matrix (n, n) whose upper triangle this is, in its memory."""
    for start in range(0, len(upper), STRIP):
        stop = min(start + STRIP, len(upper))
        own = upper[start:stop, start:stop]
        own.copy_(own.triu() + own.triu(1).T)
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper


class Accumulator:
    """Sums of the moments of inputs, from batches of rows.

    What is added up are products of the rows less a shift, about the mean of the first batch: they keep their digits, and what is
    left of the mean is taken out once, at the end. Products of float32 rows are float32. bfloat16 rows stay what they are: on a CPU
    a batch's products come rounded to bfloat16, each by at most 0.4 % of itself, which averages out over batches and is far less
    than another text of the same length would change. Squares, and with them the diagonal, have no part in that, nor have the few
    rows which would drown the others: a first token may be a thousand times as large.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.sequences = 0
        self._sum = torch.zeros(width, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._off, self._squares = torch.zeros_like(self._sum), torch.zeros_like(self._sum)  # of the rows that are multiplied
        self._shift: Tensor | None = None
        self._products = torch.zeros(width, width, device=device)  # its upper triangle

    def add(self, x: Tensor) -> None:
        """Add inputs (sequences, length, n)."""
        given = x.reshape(-1, x.shape[-1])
        if given.dtype != torch.bfloat16:
            given = given.float()
        if self._shift is None:
            self._shift = given[~_large(_sums(given)[2])].mean(0, dtype=torch.float32).to(given.dtype)
        rows, large = given - self._shift, None
        own, squares, sizes = _sums(rows)
        exact = own
        if rows.dtype == torch.bfloat16:
            # The difference is rounded, too, and all in one direction where inputs are few distinct numbers.
            exact = _sums(given)[0] - len(rows) * self._shift.to(own)
            apart = _large(sizes)
            if apart.any():
                large = given[apart].float() - self._shift.float()
                for each, sign in ((rows[apart].float(), -1), (large, 1)):
                    own, squares = own + sign * each.sum(0), squares + sign * each.square().sum(0)
                rows[apart] = 0
        self.tokens, self.sequences = self.tokens + len(rows), self.sequences + x.shape[0]
        self._sum += exact
        self._off += own
        self._squares += squares
        turned = rows.T.contiguous()
        for start in range(0, rows.shape[1], STRIP):  # the products never exist whole, and each of them once
            strip, rest = slice(start, start + STRIP), slice(start, None)
            part = self._products[strip, rest]
            part += _product(turned[strip], rows[:, rest])
            if large is not None:
                part.addmm_(large[:, strip].T, large[:, rest])

    def moments(self) -> Moments:
        """The moments of what was added; of the scatter only the upper triangle. To be called once: it is theirs."""
        count = max(self.tokens, 1)
        off = self._off / count
        scatter, own = self._products, (self._squares - self.tokens * off.square()).clamp_min(0)
        for start in range(0, len(off), STRIP):
            strip, rest = slice(start, start + STRIP), slice(start, None)
            scatter[strip, rest].addr_(off[strip].float(), off[rest].float(), alpha=-self.tokens)
        scatter.diagonal().copy_(own)
        mean = self._sum / count
        return Moments(self.tokens, mean if self._shift is None else mean + self._shift, scatter)

    def finish(self, judge: Accumulator | None = None) -> BlockStatistics:
        """The statistics of what was added here and to ``judge``, of which the moments are also kept apart. To be called once."""
        own = self.moments()
        kept = None
        if judge is not None:
            theirs = judge.moments()
            own = _merged(own, theirs)
            kept = Moments(theirs.tokens, theirs.mean.float(), mirror(theirs.scatter))
        spread = own.scatter.diagonal().to(own.mean)
        variance, energy = spread / max(own.tokens - 1, 1), spread + own.tokens * own.mean.square()
        sequences = self.sequences + (judge.sequences if judge is not None else 0)
        return BlockStatistics(own.tokens, sequences, own.mean, variance, energy, mirror(own.scatter), kept)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; on a GPU in float32, as which it adds up what is multiplied in bfloat16."""
    product: Tensor = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype == torch.bfloat16 else a @ b
    return product


def _sums(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the columns of rows (t, n) the sums and the sums of squares, (n,), and of the rows the sums of squares, (t,)."""
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    total = torch.zeros(rows.shape[1], dtype=dtype, device=rows.device)
    squares, sizes = torch.zeros_like(total), []
    # A CPU goes through a few rows three times while they are near.
    for part in rows.split(SUMMED if rows.device.type == "cpu" else max(len(rows), 1)):
        wide = part.float()
        total += wide.sum(0)
        wide = wide.square()
        squares += wide.sum(0)
        sizes.append(wide.sum(1))
    return total, squares, torch.cat(sizes)


def _large(sizes: Tensor) -> Tensor:
    """Which rows are much larger than most of them, by their sums of squares."""
    return sizes > LARGE**2 * sizes.median()


def _merged(one: Moments, other: Moments) -> Moments:
    """The moments of both, upper triangles, after Chan, Golub and LeVeque; in the memory of ``one``."""
    tokens = one.tokens + other.tokens
    between = (other.mean - one.mean).to(one.scatter)
    weight = one.tokens * other.tokens / tokens
    for start in range(0, len(between), STRIP):
        strip, rest = slice(start, start + STRIP), slice(start, None)
        part = one.scatter[strip, rest]
        part += other.scatter[strip, rest]
        part.addr_(between[strip], between[rest], alpha=weight)
    return Moments(tokens, one.mean + (other.mean - one.mean) * (other.tokens / tokens), one.scatter)


def merged(parts: Sequence[BlockStatistics]) -> BlockStatistics:
    """The statistics of all ``parts``, which are of different sequences. To be called once: the first one's memory is theirs.

    A judge is kept only where each part has one.
    """
    if len(parts) == 1:
        return parts[0]
    own = reduce(_merged, (Moments(part.tokens, part.mean, part.scatter) for part in parts))
    judges = [part.judge for part in parts if part.judge is not None]
    judge = reduce(_merged, judges) if len(judges) == len(parts) else None
    spread = own.scatter.diagonal().to(own.mean)
    return BlockStatistics(
        own.tokens,
        sum(part.sequences for part in parts),
        own.mean,
        spread / max(own.tokens - 1, 1),
        torch.stack([part.energy for part in parts]).sum(0),
        mirror(own.scatter),
        None if judge is None else Moments(judge.tokens, judge.mean, mirror(judge.scatter)),
    )


def part_of(sequences: int, part: int, parts: int) -> slice:
    """The sequences of one of ``parts``; every JUDGES-th one of all is a JUDGES-th one of its part."""
    groups = -(-sequences // JUDGES)
    return slice(groups * part // parts * JUDGES, groups * (part + 1) // parts * JUDGES)


class _Site:
    """The sums at one place of a layer: over the sequences that judge, and over the others."""

    def __init__(self, width: int, device: torch.device, *, judged: bool) -> None:
        self.fitted = Accumulator(width, device)
        self.judge = Accumulator(width, device) if judged else None

    def add(self, z: Tensor, *, judging: bool) -> None:
        """Inputs (sequences, length, n)."""
        (self.judge if judging and self.judge is not None else self.fitted).add(z)

    def finish(self) -> BlockStatistics:
        return self.fitted.finish(self.judge)


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
    judges = torch.arange(len(tokens)) % JUDGES == JUDGES - 1
    judged = OUTPUTS if judges.any() else ()  # only output matrices are fitted
    step = max(1, _tokens_at_once(arch, memory) // length)
    size = tokens.numel() * arch.hidden * 4
    with torch.no_grad(), disk_errors(scratch or ""), stream_file(size, memory, scratch) as file:
        stream = Stream(file)
        for group in (tokens[~judges], tokens[judges]) if judged else (tokens,):
            first_judge = stream.parts if judged else len(tokens)
            for sequences in group.split(step):
                stream.add(arch.embed(sequences.to(arch.device)))
        for layer in range(arch.layers):
            if cancelled():
                raise CancelledTaskError("Cancelled while collecting statistics.")
            a, f = arch.attention(layer), checkpoint_ffn(arch, layer)
            widths = {"qkv": arch.hidden, "attention": a.o.shape[1], "gate_up": arch.hidden, "ffn": f.down.shape[1]}
            seen = {site: _Site(widths[site], arch.device, judged=site in judged) for site in SITES if site in sites}
            broken = False
            for index in range(stream.parts):
                part, judging = stream.take(index, arch.device), index >= first_judge
                if "qkv" in seen:
                    seen["qkv"].add(arch.attention_norm(layer, part).to(arch.dtype), judging=judging)
                z = arch.attention_inputs(layer, part, a, rope)
                if "attention" in seen:
                    seen["attention"].add(z, judging=judging)
                part += arch.attention_output(layer, z, a).float()
                if "gate_up" in seen:
                    seen["gate_up"].add(arch.ffn_norm(layer, part).to(arch.dtype), judging=judging)
                z = arch.ffn_inputs(layer, part, f)
                if "ffn" in seen:
                    seen["ffn"].add(z, judging=judging)
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
