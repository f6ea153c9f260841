"""Log-likelihoods of continuations of a context, as multiple-choice tasks need them.

A row holds a context and, after it, all its continuations. Each continuation begins at the position after the context and sees only
the context and itself, so the context is computed once and not once per continuation. Rows are padded on the left, which puts the
positions whose logits are needed at the end of every row; the output head is applied only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from selfpruner.calibration.soundness import not_numbers
from selfpruner.errors import CancelledTaskError

# Tokens of a batch, padding included. A CPU is as fast with few, and they stay in its caches.
BATCH_TOKENS = {"cpu": 512}
BATCH_TOKENS_ELSEWHERE = 16_384
LOGIT_BYTES = 256 << 20
# Positions whose logits are float32 at a time; on a CPU as few as its caches hold.
_CHUNK = {"cpu": 16}
_CHUNK_ELSEWHERE = 128


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids: a context of at least one, and continuations of at least one each."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """``logprob`` in nats, summed over the continuation's tokens; ``greedy``: each of them is the likeliest."""

    logprob: float
    greedy: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """A context and some of its continuations; ``owner`` is the question's number, ``first`` the first continuation's."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]
    owner: int
    first: int

    @property
    def wanted(self) -> int:
        """Positions whose logits are wanted: the context's last, and all but the last of every continuation."""
        return 1 + sum(len(continuation) - 1 for continuation in self.continuations)

    @property
    def length(self) -> int:
        return len(self.context) - 1 + self.wanted


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel,
    questions: Sequence[Question],
    *,
    max_length: int | None = None,
    share: bool = True,
    batch_tokens: int | None = None,
    logit_bytes: int = LOGIT_BYTES,
    progress: Callable[[int, int], None] = lambda *_: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[list[Likelihood]]:
    """Score every continuation of every question.

    Where context and continuation are longer than ``max_length`` tokens (default: the model's context), the beginning of the
    context is cut off. A batch is as many rows as ``batch_tokens`` and ``logit_bytes`` hold, at least one. Without ``share``
    every continuation has a row of its own. ``progress`` is told (tokens done, all tokens). Raises CancelledTaskError between
    batches, and ModelError where the model computes NaN or infinity.
    """
    tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS_ELSEWHERE)
    config: PreTrainedConfig = model.config.get_text_config()
    longest = max_length or int(config.max_position_embeddings)
    # Within its window a sliding layer sees everything; beyond, what it sees depends on the layer, and rows are left to the model.
    window = getattr(config, "sliding_window", None) or longest
    shared: list[_Row] = []
    alone: list[_Row] = []
    for number, question in enumerate(questions):
        path = len(question.context) + max(map(len, question.continuations)) - 1
        if share and path <= min(longest, window):
            shared += _rows(question, number, tokens)
            continue
        for index, continuation in enumerate(question.continuations):
            kept = max(1, longest + 1 - len(continuation))
            alone.append(_Row(question.context[-kept:], [continuation], number, index))
    answers = [[Likelihood(0.0, True)] * len(question.continuations) for question in questions]
    total, done = sum(row.length for row in (*shared, *alone)), 0
    wide = int(config.vocab_size) * 4
    for rows, sharing in ((shared, True), (alone, False)):
        for batch in _batches(rows, tokens, max(1, logit_bytes // wide)):
            if cancelled():
                raise CancelledTaskError("Cancelled while scoring continuations.")
            for row, scores in zip(batch, _score(model, batch, sharing), strict=True):
                answers[row.owner][row.first : row.first + len(scores)] = scores
            done += sum(row.length for row in batch)
            progress(done, total)
    return answers


def _rows(question: Question, owner: int, tokens: int) -> Iterator[_Row]:
    """The question in as few rows of at most ``tokens`` as its continuations need, one continuation at least in each."""
    first, length = 0, len(question.context)
    for index, continuation in enumerate(question.continuations):
        length += len(continuation) - 1
        if index > first and length > tokens:
            yield _Row(question.context, question.continuations[first:index], owner, first)
            first, length = index, len(question.context) + len(continuation) - 1
    yield _Row(question.context, question.continuations[first:], owner, first)


def _batches(rows: Sequence[_Row], tokens: int, logits: int) -> Iterator[list[_Row]]:
    """Rows of like length together, the longest first; at most so many tokens and positions with logits, padding included."""
    batch: list[_Row] = []
    length = wanted = 0
    for row in sorted(rows, key=lambda row: (-row.length, -row.wanted)):
        length, wanted = max(length, row.length), max(wanted, row.wanted)
        if batch and ((len(batch) + 1) * length > tokens or (len(batch) + 1) * wanted > logits):
            yield batch
            batch, length, wanted = [], row.length, row.wanted
        batch.append(row)
    if batch:
        yield batch


def _score(model: PreTrainedModel, rows: Sequence[_Row], sharing: bool) -> list[list[Likelihood]]:
    length, wanted = max(row.length for row in rows), max(row.wanted for row in rows)
    ids, positions = torch.zeros(2, len(rows), length, dtype=torch.long)
    # The branch of a token: 0 is the context, -1 padding. A token sees what came before it in the context and in its own branch.
    branch = torch.full((len(rows), length), -1)
    places: list[
        list[tuple[int, int]]
    ] = []  # per row and continuation: (position that predicts its first token, that of its second)
    for number, row in enumerate(rows):
        at = length - row.length
        flat = [*row.context, *(token for continuation in row.continuations for token in continuation[:-1])]
        ids[number, at:] = torch.tensor(flat)
        start = at + len(row.context)
        branch[number, at:start] = 0
        positions[number, at:start] = torch.arange(len(row.context))
        end_of_context, spans = start - 1, []
        for twig, continuation in enumerate(row.continuations, 1):
            size = len(continuation) - 1
            branch[number, start : start + size] = twig
            positions[number, start : start + size] = torch.arange(len(row.context), len(row.context) + size)
            spans.append((end_of_context, start))
            start += size
        places.append(spans)
    device = model.device
    mask = _branched(branch, model.dtype) if sharing else (branch >= 0).long()
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=False,
        logits_to_keep=wanted,
    )
    index: list[int] = []
    target: list[int] = []
    for number, (row, spans) in enumerate(zip(rows, places, strict=True)):
        for continuation, (first, rest) in zip(row.continuations, spans, strict=True):
            steps = [first, *range(rest, rest + len(continuation) - 1)]
            index += [number * wanted + step - (length - wanted) for step in steps]
            target += continuation
    wanted_ids = torch.tensor(index, device=device), torch.tensor(target, device=device)
    logprobs, greedy = _chosen(model, output.logits.flatten(0, 1), *wanted_ids)
    scores: list[list[Likelihood]] = []
    at = 0
    for row in rows:
        scores.append([])
        for continuation in row.continuations:
            part = slice(at, at + len(continuation))
            scores[-1].append(Likelihood(float(logprobs[part].sum()), bool(greedy[part].all())))
            at += len(continuation)
    return scores


def _branched(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive attention mask (rows, 1, length, length) of branches (rows, length)."""
    length = branch.shape[1]
    same = branch[:, :, None] == branch[:, None, :]
    seen = (same | (branch == 0)[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    # Padding sees itself: a softmax over nothing is not a number, and would spread.
    seen |= torch.eye(length, dtype=torch.bool)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _chosen(model: PreTrainedModel, logits: Tensor, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n,) float64 of the tokens ``target`` under the rows ``index`` of ``logits``, and whether each is the
    likeliest; on the CPU."""
    logprobs, greedy = [], []
    chunk = _CHUNK.get(model.device.type, _CHUNK_ELSEWHERE)
    for rows, wanted in zip(index.split(chunk), target.split(chunk), strict=True):
        part = logits[rows].float()
        logprobs.append(part.gather(1, wanted[:, None]).squeeze(1) - part.logsumexp(-1))
        greedy.append(part.argmax(-1) == wanted)
    chosen = torch.cat(logprobs).double().cpu()
    if chosen.isnan().any():
        raise not_numbers(model)
    return chosen, torch.cat(greedy).cpu()
