"""Grammar-constrained decoding on a tiny random model: whatever the weights say, the reply is valid JSON under the schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from selfpruner.errors import CancelledTaskError, ProposerError
from selfpruner.proposers import constrained
from selfpruner.proposers.constrained import complete, longest_reply
from selfpruner.testing.tiny_models import FAMILIES, tiny_model

MESSAGES = ({"role": "system", "content": "Rules."}, {"role": "user", "content": "Write a plan."})


def numbers(count: int, most: int = 90) -> dict[str, Any]:
    item = {"type": "integer", "minimum": 0, "maximum": most}
    return {"type": "array", "items": item, "minItems": count, "maxItems": count}


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMA = closed(
    plans={"type": "array", "items": closed(attention=numbers(5), ffn=numbers(5)), "minItems": 1, "maxItems": 1},
)
Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> Pair:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), AutoTokenizer.from_pretrained(tiny_llama)


def check(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["plans"]
    (plan,) = value["plans"]
    assert list(plan) == ["attention", "ffn"]
    for rates in plan.values():
        assert len(rates) == 5
        assert all(type(rate) is int and 0 <= rate <= 90 for rate in rates)
    assert text == json.dumps(value, separators=(",", ":"))


def test_twenty_seeds_give_twenty_valid_replies(pair: Pair) -> None:
    longest = longest_reply(SCHEMA)
    assert longest is not None
    replies = set()
    for seed in range(20):
        done = complete(*pair, MESSAGES, SCHEMA, 1.0, longest, seed)
        check(done["text"])
        assert done["completion_tokens"] <= longest
        assert len(done["text"]) <= longest
        assert done["prompt_tokens"] > 0 < done["seconds"]
        replies.add(done["text"])
    assert len(replies) > 15


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_other_families_do_too(family: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, family)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    check(complete(model, tokenizer, MESSAGES, SCHEMA, 2.0, 500, 0)["text"])


def test_equal_seeds_equal_replies(pair: Pair) -> None:
    first, second, other = (complete(*pair, MESSAGES, SCHEMA, 1.0, 500, seed)["text"] for seed in (4, 4, 5))
    assert first == second != other
    assert len({complete(*pair, MESSAGES, SCHEMA, 0.0, 500, seed)["text"] for seed in range(3)}) == 1


def test_the_cache_changes_nothing(pair: Pair) -> None:
    """Greedy decoding with the KV cache and skipped tokens gives the tokens that scoring the whole text anew prefers."""
    model, tokenizer = pair
    schema = closed(rates=numbers(6))
    text = complete(model, tokenizer, MESSAGES, schema, 0.0, 500, 0)["text"]
    prompt = tokenizer.apply_chat_template([dict(m) for m in MESSAGES], tokenize=False, add_generation_prompt=True)
    digits = {str(digit): tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)}
    first = text.index("[") + 1
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] + [tokenizer.convert_tokens_to_ids(c) for c in text[:first]]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    assert max(digits, key=lambda digit: float(logits[digits[digit]])) == text[first]


def test_the_rules_are_read_once(tiny_llama: Path) -> None:
    """Another question under the same rules reads only what is new, and is answered as if it were the first."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rules = {"role": "system", "content": "Some rules that are the same in every question. " * 3}
    questions = [(rules, {"role": "user", "content": f"{name} some plans."}) for name in ("Mutate", "Cross", "Mutate")]
    questions.append(({"role": "system", "content": "Other rules."}, questions[0][1]))

    def answers(model: PreTrainedModel, asked: Sequence[Sequence[Mapping[str, str]]]) -> tuple[list[str], list[list[int]]]:
        passes: list[list[int]] = []
        forward = model.base_model.forward

        def counted(**inputs: Any) -> Any:
            passes[-1].append(inputs["input_ids"].shape[1])
            return forward(**inputs)

        model.base_model.forward = counted  # type: ignore[method-assign]
        texts = []
        for messages in asked:
            passes.append([])
            texts.append(complete(model, tokenizer, messages, SCHEMA, 1.0, 500, 3)["text"])
        return texts, passes

    def fresh() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()

    kept, passes = answers(fresh(), questions)
    alone = [answers(fresh(), [messages])[0][0] for messages in questions]
    assert kept == alone
    assert kept[0] == kept[2] != kept[1]
    first, second, third, last = passes
    assert first[0] > first[1]  # the rules, then the question
    assert third == first[1:]
    assert second[0] < first[0]
    assert last[0] < first[0]
    assert len(last) == len(answers(fresh(), questions[3:])[1][0])


def test_a_long_beginning_is_not_kept(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), AutoTokenizer.from_pretrained(tiny_llama)
    expected = complete(model, tokenizer, MESSAGES, SCHEMA, 1.0, 500, 0)["text"]
    assert model in constrained._BEGINNINGS
    monkeypatch.setattr(constrained, "_BEGINNING_BYTES", 100)
    constrained._BEGINNINGS.clear()
    assert complete(model, tokenizer, MESSAGES, SCHEMA, 1.0, 500, 0)["text"] == expected
    assert model not in constrained._BEGINNINGS


def test_too_few_tokens_is_truncated(pair: Pair) -> None:
    with pytest.raises(ProposerError) as caught:
        complete(*pair, MESSAGES, SCHEMA, 1.0, 10, 0)
    assert caught.value.code == "truncated"


def test_cancelled_stops_between_tokens(pair: Pair) -> None:
    polls = iter([False] * 5 + [True])
    with pytest.raises(CancelledTaskError):
        complete(*pair, MESSAGES, SCHEMA, 1.0, 500, 0, lambda: next(polls))


def test_a_prompt_beyond_the_window_loses_its_middle(pair: Pair) -> None:
    model, _ = pair
    long = (MESSAGES[0], {"role": "user", "content": "history " * 400 + "The question."})
    done = complete(*pair, long, SCHEMA, 1.0, 500, 0)
    check(done["text"])
    longest = longest_reply(SCHEMA)
    assert longest is not None
    assert done["prompt_tokens"] == model.config.max_position_embeddings - longest
    assert constrained._fit(list(range(100)), 40, 10) == [*range(10), *range(80, 100)]
    assert constrained._fit([1, 2], None, 10) == [1, 2]


@pytest.mark.parametrize(
    "template",
    [None, "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0]['content'] }}"],
)
def test_tokenizers_without_template_or_system_message(pair: Pair, tiny_llama: Path, template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    check(complete(pair[0], tokenizer, MESSAGES, SCHEMA, 1.0, 500, 0)["text"])
    written = tokenizer.decode(constrained._encode(tokenizer, MESSAGES))
    assert "Rules." in written
    assert "Write a plan." in written


def test_grammars_are_compiled_once(pair: Pair) -> None:
    model, tokenizer = pair
    complete(model, tokenizer, MESSAGES, SCHEMA, 1.0, 500, 0)
    compiled = constrained._compiled(tokenizer, model.config.vocab_size)
    grammar = constrained._grammar(compiled, SCHEMA)
    assert constrained._compiled(tokenizer, model.config.vocab_size) is compiled
    assert constrained._grammar(compiled, SCHEMA) is grammar
    for count in range(1, 40):
        constrained._grammar(compiled, closed(rates=numbers(count)))
    assert len(compiled.grammars) == 32


def test_longest_reply() -> None:
    assert longest_reply(closed(rates=numbers(3, 99))) == len('{"rates":[99,99,99]}')
    pairs = {"type": "array", "items": numbers(2, 5), "minItems": 2, "maxItems": 2}
    assert longest_reply(closed(pairs=pairs, done={"type": "boolean"})) == len('{"pairs":[[5,5],[5,5]],"done":false}')
    assert longest_reply(closed(text={"type": "string"})) is None
    assert longest_reply(closed(rates={"type": "array", "items": {"type": "integer"}})) is None


def test_text_and_names_are_bounded_too(pair: Pair) -> None:
    text = {"type": "string", "minLength": 1, "maxLength": 20}
    change = closed(layer={"type": "integer", "minimum": 1, "maximum": 30}, block={"type": "string", "enum": ["attention", "ffn"]})
    schema = closed(lesson=text, changes={"type": "array", "items": change, "minItems": 1, "maxItems": 2})
    longest = longest_reply(schema)
    assert longest == len('{"lesson":"' + 20 * "x" + '","changes":[' + '{"layer":30,"block":"attention"},' * 2) - 1 + len("]}")
    assert longest_reply(closed(lesson={"type": "string"})) is None
    for seed in range(3):
        value = json.loads(complete(*pair, MESSAGES, schema, 1.0, 6 * longest, seed)["text"])
        assert 1 <= len(value["lesson"]) <= 20
        assert {change["block"] for change in value["changes"]} <= {"attention", "ffn"}
