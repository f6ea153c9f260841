"""A tokenizer as GGUF metadata, and what llama.cpp makes of such metadata.

llama.cpp reads no tokenizer files: it has a handful of tokenizers built in, and ``tokenizer.ggml.model`` and ``tokenizer.ggml.pre``
tell it which of them to run on the file's tokens, merges or scores. The name is found by comparison. The tokenizer's own
pre-tokenizer has to cut a text, on which all known ones differ, the way one of them does; and :func:`encode`, which computes ids
from the metadata alone, has to agree with the tokenizer. A tokenizer that fits none is refused, because a wrong name costs quality
that nobody can trace.

Two kinds exist among the supported families: byte-level BPE (``gpt2``) and sentencepiece BPE with byte fallback (``llama``), which
merges by the score of the merged token instead of the rank of a pair.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import TypedDict

from pydantic import BaseModel, ConfigDict
from tokenizers import AddedToken, Regex, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as InTurn
from transformers import PreTrainedTokenizerBase

from selfpruner.errors import FormatError

# llama.cpp's types of a token.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# What the tokenizer.json files of the models say that llama.cpp's names stand for.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# In this text the known pre-tokenizers, and others that are close to one of them, differ. Its characters are in composed form.
PROBE = (
    (
        "It's Tom's, THEY'LL say; isn't o'there 'tis? We'Ve 7 42 365 1984 31415 2718281 items at $3.50 (or -12%).\n"
        "  two  spaces,\ttabs\t\tand \n \n\n\n lines\r\n   the end   \n"
        "def f(x_1: int) -> str:\n    return f'{x_1!r}...' # no//comment/\n/path\n"
        "camelCaseWords HTTPServer naïve Ärger ΑΒΓ αβγ Привет 你好世界 こんにちは 한국어 हिन्दी สวัสดี ½ ² Ⅷ ٣٤ "
        "→ ≠ 🙂👩‍👩‍👧 --- === !!! ???\n\n\t end."
    )
    + " " * 520
    + "x"
)


Value = str | float | Sequence[str] | Sequence[float]  # of a file's metadata; a float may be an int or a bool


class _Model(TypedDict):
    type: str
    vocab: dict[str, int]
    merges: list[str | list[str]]
    byte_fallback: bool
    ignore_merges: bool
    unk_token: str | None


class _Added(TypedDict):
    id: int
    content: str
    special: bool


class _Normalizer(TypedDict, total=False):
    type: str
    normalizers: list[object]


class _TokenizerFile(TypedDict):
    """What is read of a tokenizer.json; of a model other than BPE only its type is as here."""

    model: _Model
    added_tokens: list[_Added]
    normalizer: _Normalizer | None


class _Keys(BaseModel):
    """A file's ``tokenizer.ggml.*`` keys, as far as ids follow from them."""

    model_config = ConfigDict(alias_generator="tokenizer.ggml.{}".format)

    model: str
    pre: str
    tokens: list[str]
    token_type: list[int]
    merges: list[str] = []
    scores: list[float] = []
    add_space_prefix: bool = True
    add_bos_token: bool
    add_eos_token: bool
    bos_token_id: int | None = None
    eos_token_id: int | None = None


@cache
def _pre_tokenizers() -> Mapping[str, tuple[PreTokenizer, bool]]:
    """llama.cpp's name -> (the same as a pre-tokenizer, whether whole words in the vocabulary go before merges)."""

    def split(pattern: str) -> PreTokenizer:
        return InTurn([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])

    return {
        "gpt-2": (ByteLevel(add_prefix_space=False), False),
        "smollm": (InTurn([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), False),
        "qwen2": (split(_QWEN2), False),
        "llama-bpe": (split(_LLAMA3), True),
        "smaug-bpe": (split(_LLAMA3), False),
        "tekken": (split(_TEKKEN), True),
    }


def metadata(tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int] = ()) -> dict[str, Value]:
    """The ``tokenizer.*`` keys of a GGUF file for a model of ``vocabulary`` tokens; ``ends`` are the ids that end a generation.

    Raises FormatError for a tokenizer that llama.cpp cannot run.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("is a Python model, not BPE")
    body: _TokenizerFile = json.loads(backend.to_str())
    model = body["model"]
    if model["type"] != "BPE":
        raise _refusal(f"is a {model['type']} model, not BPE")
    if not model["merges"]:
        raise _refusal("has no merges")
    tokens, types = _tokens(body, vocabulary)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    found: dict[str, Value]
    if model["byte_fallback"]:
        prefix = bool(backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁"))
        scores = _scores(tokens, types, merges)
        found = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types}
        found["add_space_prefix"] = prefix
    else:
        pre = _pre_tokenizer_name(backend, body)
        found = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": [" ".join(m) for m in merges]}
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = {"bos": bos, "eos": eos, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    # llama.cpp knows three ways to end, and stops at each.
    special |= dict(zip(("eot", "eom"), (end for end in dict.fromkeys(ends) if end != eos), strict=False))
    found |= {f"{name}_token_id": int(index) for name, index in special.items() if index is not None and index < vocabulary}
    found |= {"add_bos_token": bos is not None and ids[:1] == [bos], "add_eos_token": eos is not None and ids[-1:] == [eos]}
    keys = {f"tokenizer.ggml.{name}": value for name, value in found.items()} | _templates(tokenizer)
    if encode(keys, PROBE) != tokenizer(PROBE, verbose=False)["input_ids"]:
        raise _refusal("cuts a text into other tokens than llama.cpp would")
    return keys


def encode(keys: Mapping[str, object], text: str) -> list[int]:
    """The ids that llama.cpp computes for ``text`` without special tokens in it, from a file's ``tokenizer.ggml.*`` keys."""
    own = _Keys.model_validate(keys)
    vocabulary = {token: index for index, token in enumerate(own.tokens)}
    if own.model == "llama":
        ids = _merge_by_score(own, vocabulary, text)
    else:
        pre, ignore_merges = _pre_tokenizers()[own.pre]
        merges = [(left, right) for left, right in (merge.split(" ", 1) for merge in own.merges)]
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
        backend.pre_tokenizer = pre
        given = [token for token, kind in zip(own.tokens, own.token_type, strict=True) if kind == USER_DEFINED]
        backend.add_tokens([AddedToken(token, normalized=False) for token in given])
        ids = backend.encode(text, add_special_tokens=False).ids
    before, after = own.bos_token_id if own.add_bos_token else None, own.eos_token_id if own.add_eos_token else None
    return [*([] if before is None else [before]), *ids, *([] if after is None else [after])]


def _refusal(what: str) -> FormatError:
    return FormatError(
        f"The tokenizer {what}, so llama.cpp would feed the model other tokens. Export to another format; GGUF knows byte-level "
        f"BPE cut as one of {', '.join(_pre_tokenizers())}, and sentencepiece BPE with byte fallback.",
        param="format",
    )


def _tokens(body: _TokenizerFile, vocabulary: int) -> tuple[list[str], list[int]]:
    """Every id's token and type; ids that the tokenizer does not use get a name that no text has. Tokens that the model has no row
    for are left out: llama.cpp wants as many as there are rows."""
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [UNUSED] * vocabulary
    model = body["model"]
    for token, index in model["vocab"].items():
        if index >= vocabulary:
            raise _refusal(f"has {len(model['vocab']):,} tokens without its added ones, and the model {vocabulary:,}")
        tokens[index] = token
        is_byte = model["byte_fallback"] and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        types[index] = BYTE if is_byte else UNKNOWN if token == model["unk_token"] else NORMAL
    for added in body["added_tokens"]:
        if added["id"] >= vocabulary:
            continue
        tokens[added["id"]] = added["content"]
        if types[added["id"]] != UNKNOWN:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    (token, count), *_ = Counter(tokens).most_common(1)
    if count > 1:
        raise _refusal(f"has {token!r} {count} times")
    return tokens, types


def _pre_tokenizer_name(backend: Tokenizer, body: _TokenizerFile) -> str:
    normalizer = body["normalizer"]
    # llama.cpp leaves composed forms to the user, as nearly all text is in them.
    if normalizer and normalizer["type"] != "NFC" and normalizer.get("normalizers") != []:
        raise _refusal(f"normalises text ({normalizer['type']})")
    own = backend.pre_tokenizer and backend.pre_tokenizer.pre_tokenize_str(PROBE)
    for name, (known, ignore_merges) in _pre_tokenizers().items():
        if own == known.pre_tokenize_str(PROBE) and ignore_merges == body["model"]["ignore_merges"]:
            return name
    raise _refusal("splits text before its merges in a way that has no name in llama.cpp")


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]]) -> list[float]:
    """Scores under which merging by score does what the ``merges`` do: minus the rank at which a token is first made.

    In what was made of a sentencepiece model every pair that makes a token is among the merges, and its pairs follow each other.
    Only tokens of equal score, in Llama 2 the runs of spaces, have theirs mixed; such tokens share a score here too. Raises
    FormatError where a pair is missing.
    """
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    spans = []
    for token in normal:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        ranked = [ranks.get(pair, -1) for pair in pairs if pair[0] in normal and pair[1] in normal]
        if ranked and min(ranked) < 0:
            raise _refusal(f"merges {token!r} from some pairs and not from others")
        if ranked:
            spans.append((min(ranked), max(ranked), token))
    scores: dict[str, float] = {}
    first = last = -1
    for start, end, token in sorted(spans):
        first, last = (first, max(last, end)) if start <= last else (start, end)
        scores[token] = -float(first)
    return [scores.get(token, -float(len(merges))) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)]


def _merge_by_score(own: _Keys, vocabulary: Mapping[str, int], text: str) -> list[int]:
    """Neighbours whose concatenation is a token are merged, the highest score first and the leftmost of equals."""
    parts = list(("▁" if own.add_space_prefix and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(vocabulary.get(left + right), place) for place, (left, right) in enumerate(pairwise(parts))]
        scored = [(own.scores[index], -place) for index, place in pairs if index is not None]
        if not scored:
            break
        place = -max(scored)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [vocabulary[part]] if part in vocabulary else [vocabulary[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    template = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {name: text for name, text in template.items() if name != "default"}
    keys: dict[str, Value] = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    keys |= {"tokenizer.chat_templates": list(named)} if named else {}
    return keys | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})
