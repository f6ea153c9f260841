"""How much a model repeats itself when it writes: pruning too much in places shows as loops before it shows in the KL.

Greedy continuations of a few prompts run side by side in one batch with a cache. The rate is the share of a continuation's runs of
four tokens that occurred in it before (seq-rep-4: Welleck et al. 2020, arXiv 1908.04319, section 6), 0 for none; what follows an
end of text does not count. :func:`distinct` is another figure of the field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.speed import fitting
from selfpruner.models import check_ids

RUN = 4
# Openings of common kinds of text, for the probe of ``selfpruner evaluate``.
PROMPTS = (
    "The museum on the corner of the old market square was built in",
    "The water cycle describes how water moves between the sea, the air and",
    "In a statement on Monday the minister said that the new law would",
    "To make a simple vegetable soup, first cut the onions and",
    "It was already dark when Nora heard the front door",
    "The three main causes of the war were",
    "Dear Mr. Alder, thank you for your letter of",
    "A triangle with sides of three, four and five is",
    "My phone does not charge any more since the last update. I have tried",
    "The company reported a profit of two million in the first quarter, compared with",
    "Photosynthesis is the process by which plants",
    "He scored twice in the second half as the home team",
    "Most people know that exercise is good for the heart, but",
    'def mean(values):\n    """Return the arithmetic mean of a list of numbers."""\n',
    "The patient was told to take the medicine twice a day and",
    "Once upon a time, in a village by the sea, there lived",
    "The best way to learn a new language is to",
    "Question: Why is the sky blue?\nAnswer:",
    "The hotel is a short walk from the station and offers",
    "In mathematics, a prime number is",
    "After the rain stopped, the children ran out into the garden and",
    "The first railway in the country was opened between",
    "Before you buy a used car, you should always check",
    "The court held that the contract was not valid because",
)


def repetition(
    model: PreTrainedModel, prompts: Tensor, *, new_tokens: int = 48, cancelled: Callable[[], bool] = lambda: False
) -> float:
    """Mean rate over the continuations of ``prompts`` (count, length) by ``new_tokens`` tokens each.

    Raises CancelledTaskError between tokens.
    """
    rates = [repeated(tokens) for tokens in continuations(model, prompts, new_tokens, cancelled)]
    return sum(rates) / len(rates)


def repeated(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that occurred before: 1 - distinct / all. 0 where there is none."""
    runs = [tuple(tokens[start : start + RUN]) for start in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Sequence[Sequence[int]], length: int) -> float:
    """Distinct runs of ``length`` tokens over all such runs of the texts together (distinct-n: Li et al. 2016, arXiv 1510.03055); 0
    where there is none."""
    runs = [tuple(text[start : start + length]) for text in texts for start in range(len(text) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def after_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """What the model writes after each prompt (:func:`continuations`), as much as it has positions for. Prompts of one length are a
    batch; none is padded."""
    encode = tokenizer
    positions = int(model.config.max_position_embeddings)
    longest, new_tokens = fitting(positions, new_tokens, positions)
    ids = [encode(prompt)["input_ids"][:longest] for prompt in prompts]
    check_ids([token for tokens in ids for token in tokens], model, tokenizer, "A prompt")
    written: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(tokens) for tokens in ids}):
        same = [index for index, tokens in enumerate(ids) if len(tokens) == length]
        texts = continuations(model, torch.tensor([ids[index] for index in same]), new_tokens, cancelled)
        for index, text in zip(same, texts, strict=True):
            written[index] = text
    return written


@torch.inference_mode()
def continuations(
    model: PreTrainedModel, prompts: Tensor, new_tokens: int, cancelled: Callable[[], bool] = lambda: False
) -> list[list[int]]:
    """What the model writes after each prompt, always the likeliest token, up to its end of text."""
    cache = DynamicCache(config=model.config)
    ids, written = prompts.to(model.device), []
    for _ in range(new_tokens):
        if cancelled():
            raise CancelledTaskError("Cancelled while writing.")
        step = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = step.logits[:, -1:].argmax(-1)
        written.append(ids)
    ends = _ends(model)
    texts = torch.cat(written, 1).tolist()
    return [text[: next((index for index, token in enumerate(text) if token in ends), None)] for text in texts]


def _ends(model: PreTrainedModel) -> set[int]:
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
