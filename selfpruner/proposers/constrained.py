"""Grammar-constrained decoding with a model in memory: the reply is always valid JSON under the schema.

This is the torch side of the local proposer, and it runs in a worker. It knows nothing of plans or prompts. xgrammar compiles the
schema without free whitespace, so a schema of bounded arrays and numbers bounds the reply: :func:`longest_reply` is that bound in
characters, and every token writes at least one. Decoding keeps a KV cache and skips the model wherever the grammar leaves a single
token. Sampling happens on the CPU in float32 from a generator of its own: equal inputs give equal replies.

All questions of a job begin with the same rules. The model reads them in a pass of their own, always, so that keeping what it made
of them changes no reply.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
import xgrammar
from jinja2 import TemplateError
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from selfpruner.errors import CancelledTaskError, ProposerError
from selfpruner.models import check_ids

_MAX_GRAMMARS = 32
_BEGINNING_BYTES = 256 << 20


@dataclass(slots=True)
class _Compiler:
    """One tokenizer's grammars. Compiling walks the whole vocabulary, so both are kept."""

    vocabulary: list[bytes]
    compiler: xgrammar.GrammarCompiler
    grammars: dict[str, xgrammar.CompiledGrammar] = field(default_factory=dict)


_COMPILERS: weakref.WeakKeyDictionary[object, dict[int, _Compiler]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Beginning:
    """The rules that a model read last, and what it keeps of them."""

    tokens: list[int]
    cache: DynamicCache


# As long as the model is in memory, and at most _BEGINNING_BYTES of each.
_BEGINNINGS: weakref.WeakKeyDictionary[PreTrainedModel, _Beginning] = weakref.WeakKeyDictionary()


class Completion(TypedDict):
    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    schema: Mapping[str, object],
    temperature: float,
    max_tokens: int,
    seed: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> Completion:
    """Answer ``messages`` with ``{text, prompt_tokens, completion_tokens, seconds}``; ``text`` fits ``schema``.

    ``temperature`` 0 takes the likeliest token. A prompt longer than the context window loses its middle: the rules stand at
    its beginning, the question at its end.

    Raises ProposerError with code ``truncated`` when ``max_tokens`` does not suffice, ``rejected`` when the tokenizer cannot
    write such a reply; CancelledTaskError when ``cancelled()`` turned true.
    """
    began = time.perf_counter()
    head = model.get_output_embeddings()
    compiled = _compiled(tokenizer, int(head.weight.shape[0]))
    matcher = xgrammar.GrammarMatcher(_grammar(compiled, schema), terminate_without_stop_token=True)
    bitmask = xgrammar.allocate_token_bitmask(1, len(compiled.vocabulary))
    longest = longest_reply(schema)
    room = max_tokens if longest is None else min(max_tokens, longest)
    asked = _encode(tokenizer, messages)
    check_ids(asked, model, tokenizer, "The prompt")
    prompt = _fit(asked, getattr(model.config, "max_position_embeddings", None), room)
    generator = torch.Generator().manual_seed(seed)
    rules = _shared(prompt, asked, tokenizer, messages)
    cache = _after(model, prompt[:rules])
    pending, written = prompt[rules:], list[int]()

    while not matcher.is_terminated():
        if cancelled():
            raise CancelledTaskError("The proposal was cancelled.")
        if len(written) >= max_tokens:
            raise ProposerError(
                f"The reply did not fit in {max_tokens} tokens; raise max_tokens or ask for fewer plans.", code="truncated"
            )
        matcher.fill_next_token_bitmask(bitmask)
        allowed = _allowed(bitmask, len(compiled.vocabulary))
        if not len(allowed):
            raise ProposerError("This model's tokenizer cannot write JSON; choose another proposer.", code="rejected")
        choice = 0
        if len(allowed) > 1:
            # Only a dozen tokens can follow: scoring those alone saves the output layer, a fifth of a small model's work.
            ids = torch.tensor([pending], device=head.weight.device)
            state = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[0, -1]
            rows = allowed.to(head.weight.device)
            logits = torch.nn.functional.linear(state, head.weight[rows], None if head.bias is None else head.bias[rows])
            pending = []
            choice = _sample(logits.float().cpu(), temperature, generator)
        token = int(allowed[choice])
        matcher.accept_token(token)
        written.append(token)
        pending = [*pending, token]
    return {
        "text": b"".join(compiled.vocabulary[token] for token in written).decode(),
        "prompt_tokens": len(prompt),
        "completion_tokens": len(written),
        "seconds": time.perf_counter() - began,
    }


def longest_reply(schema: object) -> int | None:
    """Characters of the longest reply the JSON schema allows, written without whitespace; None when it has no bound.

    A string counts as many characters as it may have; escapes, which plain text hardly needs, may pass that.
    """
    match schema:
        case {"type": "object", "properties": dict(properties)}:
            parts = [(len(json.dumps(key)) + 1, longest_reply(value)) for key, value in properties.items()]
            if any(size is None for _, size in parts):
                return None
            return 2 + sum(key + (size or 0) for key, size in parts) + max(len(parts) - 1, 0)
        case {"type": "array", "items": items, "maxItems": int(most)}:
            item = longest_reply(items)
            return None if item is None else 2 + most * item + max(most - 1, 0)
        case {"type": "integer", "minimum": int(low), "maximum": int(high)}:
            return max(len(str(low)), len(str(high)))
        case {"type": "string", "enum": list(values)}:
            return max(len(json.dumps(value)) for value in values)
        case {"type": "string", "maxLength": int(most)}:
            return 2 + most
        case {"type": "boolean"}:
            return 5
    return None


def _compiled(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> _Compiler:
    """The compiler of ``tokenizer`` for a model that scores ``vocabulary`` tokens."""
    by_size = _COMPILERS.setdefault(tokenizer, {})
    if vocabulary not in by_size:
        # A stop token is named in any case, since xgrammar warns where the tokenizer has none; replies end with their last brace.
        stop = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else vocabulary - 1
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=stop)
        by_size[vocabulary] = _Compiler(info.decoded_vocab, xgrammar.GrammarCompiler(info, max_threads=2))
    return by_size[vocabulary]


def _grammar(compiled: _Compiler, schema: Mapping[str, object]) -> xgrammar.CompiledGrammar:
    key = json.dumps(schema, sort_keys=False)
    if key not in compiled.grammars:
        if len(compiled.grammars) >= _MAX_GRAMMARS:
            compiled.grammars.pop(next(iter(compiled.grammars)))
        compiled.grammars[key] = compiled.compiler.compile_json_schema(key, any_whitespace=False, separators=(",", ":"))
    return compiled.grammars[key]


def _encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of the chat, ready for the answer; plain headings where the tokenizer has no chat template."""
    chat = [dict(message) for message in messages]
    if getattr(tokenizer, "chat_template", None):
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            # Some templates know no system message (Mistral, Gemma): its text opens the first user message instead.
            merged = {"role": "user", "content": "\n\n".join(message["content"] for message in chat)}
            text = tokenizer.apply_chat_template([merged], tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    text = "".join(f"{message['role']}:\n{message['content']}\n\n" for message in chat) + "assistant:\n"
    return list(tokenizer(text, verbose=False)["input_ids"])


def _fit(prompt: list[int], window: int | None, room: int) -> list[int]:
    """``prompt`` without its middle where prompt and reply together would pass the context window."""
    most = len(prompt) if window is None else max(window - room, min(window, 16))
    if len(prompt) <= most:
        return prompt
    head = most // 3
    return prompt[:head] + prompt[len(prompt) - (most - head) :]


def _shared(prompt: list[int], asked: list[int], tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> int:
    """How many tokens at the beginning of ``prompt`` do not depend on the last message: those up to where the chat would go on in
    the same way if that message were another. 0 for a prompt that lost its middle, and where nothing comes before the message."""
    if prompt != asked:
        return 0
    other = _encode(tokenizer, [*messages[:-1], {**messages[-1], "content": ""}])
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, other, strict=False))
    return min(sum(1 for _ in same), len(prompt) - 1)


def _after(model: PreTrainedModel, tokens: list[int]) -> DynamicCache:
    """The cache of ``model`` that has read ``tokens``; from the last question where it began in the same way."""
    if not tokens:
        return DynamicCache(config=model.config)
    known = _BEGINNINGS.get(model)
    if known is None or known.tokens != tokens:
        _BEGINNINGS.pop(model, None)
        cache = DynamicCache(config=model.config)
        model.base_model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True)
        held = (getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values"))
        if sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor)) > _BEGINNING_BYTES:
            return cache
        known = _BEGINNINGS[model] = _Beginning(tokens, cache)
    return copy.deepcopy(known.cache)


def _allowed(bitmask: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Indices of the set bits, ascending. ``bitmask``: [1, ceil(vocabulary / 32)] int32."""
    words = torch.nonzero(bitmask[0]).flatten()
    bits = (bitmask[0, words, None] >> torch.arange(32, dtype=torch.int32)) & 1
    indices = (words[:, None] * 32 + torch.arange(32))[bits.bool()]
    return indices[indices < vocabulary]


def _sample(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator))
