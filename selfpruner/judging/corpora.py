"""The two texts on which the field reports perplexity, and how they are cut into windows.

    wikitext2   the test rows of WikiText-2 (raw) joined by a blank line
    c4          documents of C4 that stand apart from its customary calibration sample, joined by a space

The whole text is tokenized at once, with whatever the tokenizer itself puts before a text, and cut into consecutive windows that do
not overlap; the last, partial one is dropped. This is the protocol of GPTQ (arXiv 2210.17323) and of the pruning papers after it.
A local copy is used where there is one:

    FOLDER/wikitext2/wiki.test.raw                 the test split; a line that is only a space is an empty row
    FOLDER/c4/c4_en_train_first1000.jsonl          documents 801 to 1000 (field ``text``); the others are left to calibration

Otherwise the hub is asked: for C4 the first 1,100 documents of the first validation shard, of which 256 windows are taken.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selfpruner.calibration.files import TextFile
from selfpruner.calibration.texts import hub_documents
from selfpruner.errors import TextError
from selfpruner.models import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIKITEXT_FILE = "wikitext2/wiki.test.raw"
C4_FILE, C4_CALIBRATION = "c4/c4_en_train_first1000.jsonl", 800
_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_C4 = ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz")
_C4_DOCUMENTS, _C4_WINDOWS = 1100, 256


@dataclass(frozen=True, slots=True)
class Corpus:
    """``text`` and where it is from; ``windows``: no more than so many are taken."""

    name: str
    text: str
    source: str
    windows: int | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def corpus(name: str, data: Path | None) -> Corpus:
    """The text ``name``, from the folder ``data`` where it has it. Raises TextError."""
    if name == "wikitext2":
        if data is not None and (data / WIKITEXT_FILE).is_file():
            return Corpus(name, joined_rows(TextFile(data / WIKITEXT_FILE).documents()[0]), WIKITEXT_FILE)
        rows = _from_hub(data, WIKITEXT_FILE, hub_documents(_WIKITEXT[0], name=_WIKITEXT[1], split="test"))
        return Corpus(name, "\n\n".join(rows), f"hub:{':'.join(_WIKITEXT)}:test")
    if data is not None and (data / C4_FILE).is_file():
        documents = TextFile(data / C4_FILE).documents()[C4_CALIBRATION:]
        return Corpus(name, " ".join(documents), f"{C4_FILE}, documents {C4_CALIBRATION + 1} and later")
    shard = hub_documents(_C4[0], data_files=_C4[1], split="train")
    documents = _from_hub(data, C4_FILE, itertools.islice(shard, _C4_DOCUMENTS))
    return Corpus(name, " ".join(documents), f"hub:{_C4[0]}:{_C4[1]}, the first {_C4_DOCUMENTS:,} documents", _C4_WINDOWS)


def joined_rows(raw: str) -> str:
    """The rows of a raw WikiText file joined by a blank line: blank rows empty, the others with their own line end."""
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(raw, newline="\n"))


def windows(text: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, count: int | None = None) -> Tensor:
    """Token ids (windows, length). ``count`` takes so many, evenly spread over the text. Raises TextError where not one is full."""
    encode = tokenizer
    with quiet():  # a text longer than the context is no cause for a warning: it is cut
        ids = torch.tensor(encode(text.text)["input_ids"], dtype=torch.int64)
    whole = ids.numel() // length
    if not whole:
        raise TextError(
            f"{text.name} has {ids.numel():,} tokens: not one window of {length:,}. Ask for shorter windows.", param="seqlen"
        )
    rows = ids[: whole * length].view(whole, length)[: text.windows]
    if count is not None and count < len(rows):
        rows = rows[[len(rows) * index // count for index in range(count)]]
    return rows


def _from_hub(data: Path | None, file: str, documents: Iterable[str]) -> list[str]:
    try:
        return list(documents)
    except TextError as error:
        place = f"{data} has no {file}" if data is not None else "no folder of local data is named"
        raise TextError(
            f"{error.message.split('. ')[0]}, and {place}. Connect, or name a folder that has {file} (--data, SELFPRUNER_DATA).",
            param="perplexity",
        ) from error
