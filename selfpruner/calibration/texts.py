"""Sources of text -> batches of token ids for one role: calibration, fitness or report.

The three roles never share a token, even when they name the same source. A text that is available as a whole (a file, pydoc,
WikiText) is one stream of tokens. It is cut into stretches of at most 200,000, and each stretch into three parts: 50 % calibration,
30 % fitness, 20 % report. A text that is streamed from the hub deals its documents out to the roles by position, in the same
proportion. Text that the model writes itself comes from one stream of random numbers per role.

A large file (``files.WHOLE``) is read and tokenized only as far as needed: its stretches are measured in bytes, and a role takes a
few sequences from its part of each of many stretches spread over the file. A WikiText beyond that size is streamed.

Documents are packed: joined by the token that ends a document, cut into sequences, never padded. A sequence begins with BOS only
if the tokenizer puts it there itself. Batches are kept on disk under what was *asked for*, so ``auto`` still means the same text
when a job resumes after the network has come or gone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfpruner.calibration import files, pydoc, selftext
from selfpruner.calibration.encoding import encode
from selfpruner.calibration.files import TextFile
from selfpruner.config import Role, TextConfig
from selfpruner.errors import CancelledTaskError, TextError
from selfpruner.files import atomic
from selfpruner.files.cache_folder import use
from selfpruner.models import check_ids, hub_available, quiet
from selfpruner.models.checks import sampled_digest
from selfpruner.stages import at, count_tokens

if TYPE_CHECKING:
    from selfpruner.models import LoadedModel

_VERSION = 1
_READING = 2  # how files are read
_STRETCH = 200_000  # tokens
_STRETCH_BYTES = 1 << 20  # the same for a large file
_PARTS: dict[str, tuple[int, int]] = {"calibration": (0, 5), "fitness": (5, 8), "report": (8, 10)}  # tenths
_FIELDS = {"calibration": "calibration", "fitness": "fitness_text", "report": "report_text"}
_C4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")
_WIKITEXT = "hub:Salesforce/wikitext:wikitext-2-raw-v1:test"
# Tokens that end a document in pre-training; chat models often name another token (the end of a turn) as their eos.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True, slots=True)
class SourceShare:
    """One source as finally used: ``auto`` resolved, equal sources added up."""

    source: str
    weight: float
    sequences: int


@dataclass(frozen=True, slots=True)
class TokenBatches:
    """``tokens`` int64 (sequences, length) on the CPU; ``fingerprint`` identifies exactly these tokens."""

    tokens: Tensor
    sources: tuple[SourceShare, ...]
    fingerprint: str


def token_batches(
    config: TextConfig,
    role: Role,
    loaded: LoadedModel,
    cache: Path,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> TokenBatches:
    """The token batches of ``role``. ``seed`` draws the sequences of calibration and fitness, and the model's own text; report
    text is the same for every seed.

    Raises :class:`TextError` whose ``param`` is the request's field, :class:`CancelledTaskError`, :class:`DiskFullError`.
    """
    try:
        with at("texts"):
            return _token_batches(config, role, loaded, cache, seed, progress, cancelled)
    except TextError as error:
        error.param = _FIELDS[role]
        raise


def _token_batches(
    config: TextConfig,
    role: Role,
    loaded: LoadedModel,
    cache: Path,
    seed: int,
    progress: Callable[[str], None],
    cancelled: Callable[[], bool],
) -> TokenBatches:
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    if context is not None and config.length > context:
        raise TextError(f"Sequences of {config.length} tokens are longer than the model's context of {context}. Lower length.")
    named = {s.source: files.find(s.source) for s in config.sources if files.is_file_name(s.source)}
    for file in named.values():
        file.check()
    asked = {
        "sources": [(s.source, s.weight, _identity(named[s.source]) if s.source in named else "") for s in config.sources],
        "rest": [_VERSION, selftext.RECIPE, role, config.sequences, config.length, seed, loaded.source.fingerprint],
    }
    kept = cache / "texts" / f"{role}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]}.safetensors"
    use(kept, loaded.source.name, f"{role} of {', '.join(s.source for s in config.sources)}")
    if kept.is_file():
        with safe_open(kept, framework="pt") as file:
            shares = tuple(SourceShare(**share) for share in json.loads(file.metadata()["sources"]))
            return _batches(file.get_tensor("tokens").long(), shares)

    weights: dict[str, float] = {}
    for source in config.sources:
        name = _resolve(source.source, role)
        weights[name] = weights.get(name, 0.0) + source.weight
    counts = apportion(list(weights.values()), config.sequences)
    reader = _Reader(role, loaded, cache, seed, config.length, progress, cancelled, named)
    parts = [reader.read(name, count) for name, count in zip(weights, counts, strict=True) if count]
    # Interleaved, so that any run of sequences holds the mixture.
    places = [((row + 0.5) / len(part), index, row) for index, part in enumerate(parts) for row in range(len(part))]
    tokens = torch.stack([parts[index][row] for _, index, row in sorted(places)])
    count_tokens(tokens.numel())
    shares = tuple(SourceShare(name, weight, count) for (name, weight), count in zip(weights.items(), counts, strict=True))
    listed = [{"source": s.source, "weight": s.weight, "sequences": s.sequences} for s in shares]
    with atomic.replacing(kept) as aside:
        save_file({"tokens": tokens.int()}, aside, metadata={"sources": json.dumps(listed)})
    return _batches(tokens, shares)


def _batches(tokens: Tensor, shares: tuple[SourceShare, ...]) -> TokenBatches:
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.contiguous().numpy().tobytes())
    return TokenBatches(tokens, shares, digest.hexdigest()[:16])


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of ``total`` in proportion to ``weights`` by the largest remainder; they add up to ``total``."""
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def separator(loaded: LoadedModel) -> list[int]:
    """The token ids put between documents: the token that ended them in training, else eos, else a newline."""
    tokenizer = loaded.tokenizer
    rows = loaded.model.config.vocab_size  # the tokenizer may know more tokens
    for token in _DOCUMENT_ENDS:
        known = token in tokenizer.all_special_tokens or token in tokenizer.get_added_vocab()
        index = tokenizer.convert_tokens_to_ids(token)
        if known and isinstance(index, int) and index < rows:
            return [index]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id < rows:
        return [int(tokenizer.eos_token_id)]
    return [int(index) for index in tokenizer("\n", add_special_tokens=False)["input_ids"]]


def _resolve(source: str, role: Role) -> str:
    if source == "auto":
        if role == "report":
            return _WIKITEXT if hub_available() else "pydoc"
        return "c4" if hub_available() else "self"
    return source


def _identity(file: TextFile) -> str:
    return f"{sampled_digest(file.path)}:{file.field}:{_READING}"


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads sequences of one role from any source."""

    role: Role
    loaded: LoadedModel
    cache: Path
    seed: int
    length: int
    progress: Callable[[str], None]
    cancelled: Callable[[], bool]
    files: dict[str, TextFile]

    def read(self, source: str, count: int) -> Tensor:
        """``count`` sequences of ``source`` for this role, int64 (count, length)."""
        self.progress(f"{self.role} text from {source}")
        if source == "self":
            return self._written(count)
        if source == "pydoc":
            return self._whole(source, pydoc.documents(), count)
        if source in self.files:
            file = self.files[source]
            documents = file.whole()
            return self._sampled(source, file, count) if documents is None else self._whole(source, documents, count)
        if source == "c4":
            return self._streamed(source, hub_documents(_C4[0], data_files=_C4[1], split="train"), count)
        return self._from_hub(source, count)

    def _written(self, count: int) -> Tensor:
        start = self._start()
        rows = selftext.write(
            self.loaded,
            count=count,
            length=self.length - len(start),
            separator=separator(self.loaded),
            seed=self.seed,
            stream=self.role,
            cache=self.cache / "texts",
            progress=self.progress,
            cancelled=self.cancelled,
        )
        return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), rows], 1)

    def _from_hub(self, source: str, count: int) -> Tensor:
        _, dataset, *rest = source.split(":")
        name, split, field = (part or None for part in (*rest, "", "", "")[:3])
        documents = hub_documents(dataset, name=name, split=split or "train", field=field or "text")
        if dataset.rpartition("/")[2] == "wikitext":
            # Rows are lines. The customary perplexity text is the rows joined by a blank line.
            rows, known, size = iter(documents), list[str](), 0
            for row in rows:
                known.append(row)
                size += len(row) + 2
                if size > files.WHOLE:
                    return self._streamed(source, _grouped(itertools.chain(known, rows)), count)
            return self._whole(source, ["\n\n".join(known)], count)
        return self._streamed(source, documents, count)

    def _whole(self, source: str, documents: Iterable[str], count: int) -> Tensor:
        stream = self._stream(documents)
        stretches = max(1, len(stream) // _STRETCH)
        first, last = _PARTS[self.role]
        parts = []
        for stretch in range(stretches):
            begin, end = len(stream) * stretch // stretches, len(stream) * (stretch + 1) // stretches
            parts.append(self._cut(stream[begin + (end - begin) * first // 10 : begin + (end - begin) * last // 10]))
        sequences = torch.cat(parts)
        if len(sequences) < count:
            have = len(stream) * (last - first) // 10
            raise TextError(
                f"{source} has {len(stream):,} tokens, of which {have:,} are for {self.role} (the three roles never share text); "
                f"{count} sequences of {self.length} need {count * self.length:,}. "
                "Give a longer text, or ask for fewer or shorter sequences."
            )
        if self.role == "report":  # the same for every seed, spread over the whole text
            return sequences[[len(sequences) * index // count for index in range(count)]]
        return sequences[self._chance(source).sample(range(len(sequences)), count)]

    def _sampled(self, source: str, file: TextFile, count: int) -> Tensor:
        """From a large file: a little from each of as many stretches as there are or sequences are wanted."""
        size = file.size()
        stretches = size // _STRETCH_BYTES
        few = min(count, stretches)
        chosen = [stretches * index // few for index in range(few)]
        if self.role != "report":
            chosen = sorted(self._chance(source).sample(range(stretches), few))
        # What one stretch lacks the next ones give; where that is not enough, all is taken that there is.
        goals = [-(-count * (index + 1) // few) for index in range(few)]
        sequences = self._parts(file, size, chosen, goals)
        if len(sequences) < count:
            sequences = self._parts(file, size, range(stretches), [count] * stretches)
        if len(sequences) < count:
            raise TextError(
                f"{source} has {len(sequences):,} sequences of {self.length} tokens for {self.role} (the three roles never share "
                f"text), and {count:,} are asked for. Give a longer text, or ask for fewer or shorter sequences."
            )
        if self.role != "report":
            sequences = sequences[self._chance(source).sample(range(count), count)]
        return sequences[:count]

    def _parts(self, file: TextFile, size: int, chosen: Sequence[int], goals: Sequence[int]) -> Tensor:
        """Sequences of the role's parts of ``chosen`` stretches of a file of ``size`` bytes, up to so many after each of them."""
        stretches = size // _STRETCH_BYTES

        def places() -> Iterator[tuple[int, int]]:
            for stretch in chosen:
                begin, end = size * stretch // stretches, size * (stretch + 1) // stretches
                first, last = (begin + (end - begin) * tenth // 10 for tenth in _PARTS[self.role])
                yield first, last

        rows = torch.empty(0, self.length, dtype=torch.int64)
        for part, goal in zip(file.parts(places()), goals, strict=True):
            if len(rows) < goal:
                lacking = goal - len(rows)
                rows = torch.cat([rows, self._cut(self._stream(part, lacking))[:lacking]])
                self.progress(f"{self.role} text: {len(rows):,} of {goals[-1]:,} sequences")
        return rows

    def _streamed(self, source: str, documents: Iterable[str], count: int) -> Tensor:
        first, last = _PARTS[self.role]
        stream = self._stream((text for index, text in enumerate(documents) if first <= index % 10 < last), count)
        sequences = self._cut(stream)[:count]
        if len(sequences) < count:
            raise TextError(
                f"{source} ended after {len(stream):,} tokens for {self.role}; {count} sequences of {self.length} need "
                f"{count * self.length:,}. Ask for fewer or shorter sequences, or mix in another source."
            )
        return sequences

    def _chance(self, source: str) -> random.Random:
        return random.Random(f"{self.seed}/{self.role}/{source}")

    def _start(self) -> list[int]:
        """BOS, if the tokenizer puts it before a text by itself."""
        tokenizer = self.loaded.tokenizer
        bos = tokenizer.bos_token_id
        return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []

    def _stream(self, documents: Iterable[str], sequences: int | None = None) -> array[int]:
        """Token ids of the documents, the separator after each that has text; of no more than ``sequences`` need."""
        end, stream = separator(self.loaded), array("i")
        most = None if sequences is None else sequences * (self.length - len(self._start()))
        for document in documents:
            if not document.strip():
                continue
            for tokens in itertools.chain(encode(self.loaded.tokenizer, document), [end]):
                if self.cancelled():
                    raise CancelledTaskError(f"Cancelled while reading {self.role} text.")
                check_ids(tokens, self.loaded.model, self.loaded.tokenizer, f"The {self.role} text")
                stream.extend(tokens)
                if most is not None and len(stream) >= most:
                    return stream
        return stream

    def _cut(self, stream: array[int]) -> Tensor:
        """Sequences, int64 (count, length); the rest that does not fill one is left out."""
        start = torch.tensor(self._start(), dtype=torch.int64)
        step = self.length - len(start)
        count = len(stream) // step
        rows = torch.tensor(stream[: count * step], dtype=torch.int64).view(count, step)
        return torch.cat([start.expand(count, -1), rows], 1)


def _grouped(rows: Iterable[str], size: int = 20_000) -> Iterator[str]:
    """Rows joined by a blank line to documents of ``size`` characters or somewhat more."""
    known, length = list[str](), 0
    for row in rows:
        known.append(row)
        length += len(row) + 2
        if length >= size:
            yield "\n\n".join(known)
            known, length = [], 0
    if known:
        yield "\n\n".join(known)


def hub_documents(
    dataset: str, *, split: str, name: str | None = None, data_files: str | None = None, field: str = "text"
) -> Iterator[str]:
    """Stream one field of a hub dataset. No code that comes with the dataset is run. Raises :class:`TextError`."""
    import datasets

    offline = "Use source self (the model writes), pydoc, or a text file; or connect and try again."
    if not hub_available():
        raise TextError(f"The hub dataset {dataset} cannot be reached: there is no network, or offline mode is on. {offline}")
    try:
        with quiet():
            rows = datasets.load_dataset(dataset, name, data_files=data_files, split=split, streaming=True)
        for row in rows:
            if not isinstance(row.get(field), str):
                raise TextError(
                    f"Rows of {dataset} have no text field {field!r}, but {', '.join(row)}. Name it: hub:...:...:...:FIELD."
                )
            yield row[field]
    except TextError:
        raise
    except Exception as error:  # whatever hub, file system and decoders raise: datasets has no common base for it
        raise TextError(f"The hub dataset {dataset} cannot be read ({error}). {offline}") from error
