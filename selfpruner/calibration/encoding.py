"""Token ids of a long document that is never tokenized as a whole, which would take more than a hundred bytes per character.

Overlapping pieces are tokenized one after the other. Two neighbours are joined inside a run of tokens on which they agree, places
included. A tokenizer looks at little around a place, so the result is what the whole text would have given. Where there is no such
run (a word of thousands of characters) the text is simply cut, which may split that word differently. The same is done, at line
ends, for a tokenizer that does not report the places of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from selfpruner.models import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 50_000  # characters
OVERLAP = 2_000
# Tokens on which both pieces must agree; they are joined in the middle of them.
AGREED = 16


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    """Token ids of ``text``, without what is put around a text, in parts."""
    encoder = tokenizer
    if len(text) <= PIECE:
        with quiet():  # a document longer than the context is no cause for a warning: it is cut
            yield encoder(text, add_special_tokens=False)["input_ids"]
        return
    if not encoder.is_fast:
        yield from _by_lines(encoder, text)
        return
    first, given = 0, 0  # where the current piece begins, and how many of its tokens were given out
    known = _tokens(encoder, text, first)
    while first + PIECE < len(text):
        following = first + PIECE - OVERLAP
        tokens = _tokens(encoder, text, following)
        joint = _joint(known, tokens, following + OVERLAP // 2)
        if joint is None:
            following += OVERLAP
            tokens = _tokens(encoder, text, following)
            joint = len(known), 0
        yield [token for token, _, _ in known[given : joint[0]]]
        first, known, given = following, tokens, joint[1]
    yield [token for token, _, _ in known[given:]]


def _tokens(encoder: PreTrainedTokenizerBase, text: str, first: int) -> list[tuple[int, int, int]]:
    with quiet():
        encoded = encoder(text[first : first + PIECE], add_special_tokens=False, return_offsets_mapping=True)
    places = encoded["offset_mapping"]
    return [(token, first + begin, first + end) for token, (begin, end) in zip(encoded["input_ids"], places, strict=True)]


def _joint(before: list[tuple[int, int, int]], after: list[tuple[int, int, int]], middle: int) -> tuple[int, int] | None:
    """Where ``before`` may end and ``after`` go on: the place nearest to ``middle`` of the text with agreement around it."""
    runs = {
        tuple(after[index : index + AGREED]): index
        for index in range(len(after) - AGREED + 1)
        if after[index][1] < middle + OVERLAP
    }
    best = None
    for index in range(len(before) - AGREED, -1, -1):
        if before[index][1] < middle - OVERLAP:
            break
        match = runs.get(tuple(before[index : index + AGREED]))
        if match is not None:
            distance = abs(before[index + AGREED // 2][1] - middle)
            if best is None or distance < best[0]:
                best = distance, index + AGREED // 2, match + AGREED // 2
    return None if best is None else best[1:]


def _by_lines(encoder: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    first = 0
    while first < len(text):
        end = first + PIECE
        if end < len(text):
            end = text.rfind("\n", first, end) + 1 or end
        with quiet():
            yield encoder(text[first:end], add_special_tokens=False)["input_ids"]
        first = end
