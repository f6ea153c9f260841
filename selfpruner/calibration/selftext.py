"""The dense model writes its own text: calibration data where there is no network and no corpus.

Each row is a run of documents, packed like training text: a separator, a short opening in the manner of some kind of page, and the
model's continuation, until it ends the document, starts to repeat itself, or has used up its share. Openings are the beginnings of
web and wiki pages, not questions to a chat model, so that the text resembles what the model was trained on.

The text is a function of the model, the seed, the stream (a role's name), the count and the length. Finished chunks of rows are
kept on disk, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import hashlib
import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfpruner.architectures import Architecture, describe
from selfpruner.architectures.decoding import Decoding, cache_bytes
from selfpruner.calibration.openings import opening
from selfpruner.calibration.soundness import finite, not_finite
from selfpruner.errors import CancelledTaskError
from selfpruner.files import atomic
from selfpruner.files.cache_folder import use
from selfpruner.models import check_ids

if TYPE_CHECKING:
    from selfpruner.models import LoadedModel

# Part of the cache key: raise it when a change here or in the openings changes the text.
RECIPE = 3
# Rows are written in stretches that know nothing of each other: a tenth document is none the better for the nine before it in the
# cache, and twice as many tokens at once, each with half as much to look at, take half the time.
STRETCH = 256
MAX_ROWS = 128  # stretches at once
_CACHE_BYTES = 1 << 30  # their keys and values
_BLOCK = 256  # tokens of the vocabulary
_ROWS_IN_CACHE = 8
_LOOP = 10  # a document that says the same ten tokens twice has begun to loop
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Style:
    """How a document is sampled: softmax temperature, and the number of tokens after which the next document begins."""

    temperature: float
    longest: int


@dataclass(slots=True)
class _Row:
    """One row while it is written. ``forced`` are tokens still to be put down as they are, last first."""

    chance: random.Random
    forced: list[int] = field(default_factory=list)
    style: Style = Style(1.0, 1)
    written: int = 0
    tokens: list[int] = field(default_factory=list)
    seen: set[tuple[int, ...]] = field(default_factory=set)


def styles(chance: random.Random) -> Style:
    """Draw the style of one document.

    Temperatures stay near one and nothing is cut off, although that reads worse: the statistics come closer to those of human
    text. Error of pruned FFN outputs on C4 and WikiText, calibration on C4 = 1 (SmolLM2-135M, five layers, 20 % of the channels,
    16,384 tokens each): temperature 1 0.99; temperatures 0.7 to 1 with small min-p 1.06; 0.6 to 0.8 1.12; no openings 1.08.
    """
    longest = min(1024, max(96, int(chance.lognormvariate(5.7, 0.7))))
    return Style(temperature=chance.choice((0.95, 1.0, 1.05)), longest=longest)


def write(
    loaded: LoadedModel,
    *,
    count: int,
    length: int,
    separator: Sequence[int],
    seed: int,
    stream: str,
    cache: Path,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Tensor:
    """``count`` rows of ``length`` tokens written by the model, int64 (count, length) on the CPU.

    ``separator`` are the token ids between documents. Raises :class:`CancelledTaskError` within one decoding step,
    :class:`DiskFullError`.
    """
    identity = f"{loaded.source.fingerprint}/{loaded.dtype}/{RECIPE}/{seed}/{stream}/{count}/{length}/{list(separator)}"
    folder = cache / f"self-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
    use(folder, loaded.source.name, f"written for {stream}")
    arch = describe(loaded.model)
    pieces = -(-length // STRETCH)
    size = -(-length // pieces)
    chunks = -(-count * pieces // max(1, min(MAX_ROWS, _CACHE_BYTES // cache_bytes(arch, size))))
    parts: list[Tensor] = []
    for chunk in range(chunks):
        rows = range(count * pieces * chunk // chunks, count * pieces * (chunk + 1) // chunks)
        path = folder / f"{chunk:05d}.safetensors"
        if path.is_file():
            parts.append(load_file(path)["tokens"].long())
            continue

        def told(step: int, first: int = rows.start, rows_now: int = len(rows)) -> None:
            done = min(first * size + step * rows_now, count * length)
            progress(f"model writes text for {stream}: {done:,} of {count * length:,} tokens")

        names = [f"{seed}/{stream}/{row}" for row in rows]
        part = _write_rows(loaded, arch, names, size, list(separator), told, cancelled)
        with atomic.replacing(path) as aside:
            save_file({"tokens": part.int()}, aside)
        parts.append(part)
    return torch.cat(parts).view(count, pieces * size)[:, :length]


def _write_rows(
    loaded: LoadedModel,
    arch: Architecture,
    names: list[str],
    length: int,
    separator: list[int],
    progress: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> Tensor:
    """Rows by name; degenerate ones are written again under another name, at most ``_ATTEMPTS`` times in all."""
    done = torch.zeros(len(names), length, dtype=torch.int64)
    pending = list(range(len(names)))
    for attempt in range(_ATTEMPTS):
        tokens = _decode(loaded, arch, [f"{names[row]}/{attempt}" for row in pending], length, separator, progress, cancelled)
        for row, line in zip(pending, tokens, strict=True):
            done[row] = line
        texts = loaded.tokenizer.batch_decode(tokens)
        pending = [row for row, text in zip(pending, texts, strict=True) if is_degenerate(text)]
        if not pending:
            break
    return done


def is_degenerate(text: str) -> bool:
    """Text that says little with many letters. English prose of 2,000 letters deflates to about half; loops to far less."""
    raw = text.encode()
    return len(raw) >= 200 and len(zlib.compress(raw)) < 0.28 * len(raw)


@torch.inference_mode()
def _decode(
    loaded: LoadedModel,
    arch: Architecture,
    names: list[str],
    length: int,
    separator: list[int],
    progress: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> Tensor:
    """All rows in step, one token each per pass; int64 (rows, length) on the CPU.

    Openings are fed token by token like everything else: rows never need padding, whatever their openings' lengths.
    """
    rows = [_Row(random.Random(name)) for name in names]
    ends = set(separator) | _end_tokens(loaded)
    specials = [index for index in loaded.tokenizer.all_special_ids if index < arch.vocabulary and index not in ends]
    decoding = Decoding(arch, len(rows), length)
    logits: Tensor | None = None
    for step in range(length):
        if cancelled():
            raise CancelledTaskError("Cancelled while the model was writing text.")
        for row in rows:
            if not row.forced and (not row.tokens or row.written >= row.style.longest):
                _new_document(row, loaded, separator)
        sampled = [0] * len(rows)
        if logits is not None:
            # Chat markers and the like are no text; the end of a document is.
            logits[:, specials] = -torch.inf
            found = _sample(logits, rows)
            if found is None:
                raise not_finite(loaded.model, "The logits of the text that the model writes")
            sampled = found.tolist()
        for row, token in zip(rows, sampled, strict=True):
            _put(row, token, loaded, separator, ends)
        if step + 1 < length:
            logits = decoding.logits(torch.tensor([row.tokens[-1] for row in rows], device=loaded.device))
        if step % 32 == 31:
            progress(step + 1)
    return torch.tensor([row.tokens for row in rows])


def _end_tokens(loaded: LoadedModel) -> set[int]:
    eos = loaded.model.generation_config.eos_token_id if loaded.model.generation_config else None
    listed = eos if isinstance(eos, list) else [eos]
    return {int(index) for index in (*listed, loaded.tokenizer.eos_token_id) if index is not None}


def _new_document(row: _Row, loaded: LoadedModel, separator: list[int]) -> None:
    text = opening(row.chance)
    start = loaded.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    check_ids(start, loaded.model, loaded.tokenizer, "The beginning of a text")
    row.forced = [*separator, *start][::-1]
    row.style = styles(row.chance)
    row.written = 0
    row.seen = set()


def _put(row: _Row, sampled: int, loaded: LoadedModel, separator: list[int], ends: set[int]) -> None:
    if not row.forced and sampled in ends:
        _new_document(row, loaded, separator)
    token = row.forced.pop() if row.forced else sampled
    row.tokens.append(token)
    row.written += 1
    if row.written >= _LOOP:
        last = tuple(row.tokens[-_LOOP:])
        if last in row.seen:
            row.written = row.style.longest  # the next step begins another document
        row.seen.add(last)


def _sample(logits: Tensor, rows: list[_Row]) -> Tensor | None:
    """One token per row, (rows,), by inversion of the distribution function; None where ``logits`` (rows, V) are not finite."""
    temperature = torch.tensor([[row.style.temperature] for row in rows], device=logits.device)
    # A number is drawn in every step, needed or not: each row's sequence of numbers is its own.
    chance = torch.tensor([[row.chance.random()] for row in rows], device=logits.device)
    # A CPU's cache holds a few rows of the vocabulary; memory for all rows costs more time than the sums.
    some = _ROWS_IN_CACHE if logits.device.type == "cpu" else len(rows)
    found = [_invert(*part) for part in zip(logits.split(some), temperature.split(some), chance.split(some), strict=True)]
    known = [tokens for tokens in found if tokens is not None]
    return torch.cat(known) if len(known) == len(found) else None


def _invert(logits: Tensor, temperature: Tensor, chance: Tensor) -> Tensor | None:
    """:func:`_sample` with numbers (rows, 1) in [0, 1). First the block of the vocabulary, then the token in it: a running sum over
    the whole vocabulary would take as long as all the rest."""
    weights = (logits / temperature).softmax(-1).unflatten(1, (-1, math.gcd(logits.shape[1], _BLOCK)))
    blocks = weights.sum(-1).cumsum(-1)
    total = blocks[:, -1:]
    if not finite(total):
        return None
    # 1 - chance is in (0, 1]: the first place where the sum reaches the draw always has weight.
    draw = (1 - chance) * total
    block = torch.searchsorted(blocks, draw)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp_(min=0)), 0)
    inner = weights.take_along_dim(block[:, :, None], 1)[:, 0].cumsum(-1)
    # Sums in another order differ in their last digits: a draw beyond the block's end is its last token with weight.
    place = torch.searchsorted(inner, torch.minimum(draw - before, inner[:, -1:]))
    tokens: Tensor = block * weights.shape[2] + place
    return tokens[:, 0]
