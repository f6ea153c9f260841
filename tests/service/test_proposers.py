"""Proposers over real HTTP: every fault is a typed outcome, bounded in time and size, and no key leaks."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from selfpruner import proposers
from selfpruner.errors import ConfigError, OutOfMemoryError, WorkerError
from selfpruner.proposers.base import OUTCOMES, CallError, Reply, Request
from selfpruner.proposers.openai import OpenAIProposer
from selfpruner.proposers.reply import NonFiniteError, NotJsonError, extract
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import ProposeRequest, ProposeResult
from tests.helpers.fake_openai import FakeOpenAI

KEY = "sk-very-secret-0123456789"
SCHEMA = {
    "type": "object",
    "properties": {
        "rates": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 90}, "minItems": 3, "maxItems": 3}
    },
    "required": ["rates"],
    "additionalProperties": False,
}
REQUEST = Request(
    "mutate", ({"role": "system", "content": "Rules."}, {"role": "user", "content": "Three rates."}), SCHEMA, 0.8, 200, seed=7
)
SESSION = Session("key", {"model": "tiny"}, "/nowhere")


def settings(server: FakeOpenAI | None = None, **fields: Any) -> ProposerSettings:
    base = {"kind": "openai", "model": "fake", "api_key": KEY, "timeout": 5.0, "max_retries": 1}
    return ProposerSettings(**{**base, **({"base_url": server.base_url} if server else {}), **fields})


def ask(server: FakeOpenAI, request: Request = REQUEST, **fields: Any) -> Reply:
    return asyncio.run(OpenAIProposer("fake", settings(server, **fields)).complete(request))


def outcome(server: FakeOpenAI, **fields: Any) -> CallError:
    with pytest.raises(CallError) as caught:
        ask(server, **fields)
    assert caught.value.code in OUTCOMES
    assert KEY not in str(caught.value) + repr(caught.value)
    return caught.value


def test_good_reply_carries_usage_and_cost(fake_openai: FakeOpenAI) -> None:
    reply = ask(fake_openai, price_prompt=2.0, price_completion=10.0)
    assert len(json.loads(reply.text)["rates"]) == 3
    assert reply.model == "fake"
    assert reply.cost == pytest.approx((2 * reply.prompt_tokens + 10 * reply.completion_tokens) / 1e6)
    assert reply.prompt_tokens > 0 < reply.completion_tokens
    sent = fake_openai.requests[0]
    assert sent["response_format"]["json_schema"] == {"name": "mutate", "strict": True, "schema": SCHEMA}
    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.8, 7, 200)
    assert fake_openai.keys == [f"Bearer {KEY}"]


def test_usage_is_estimated_where_the_server_gives_none(fake_openai: FakeOpenAI) -> None:
    fake_openai.usage = False
    reply = ask(fake_openai)
    assert reply.prompt_tokens == len("Rules.Three rates.") // 2
    assert 0 < reply.completion_tokens <= len(reply.text)


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("500", "server_error"),
        ("429", "rate_limited"),
        ("401", "rejected"),
        ("400", "rejected"),
        ("redirect", "rejected"),
        ("reset", "unreachable"),
        ("cut", "unreachable"),
        ("html", "server_error"),
        ("empty", "empty"),
        ("truncated", "truncated"),
        ("refusal", "refused"),
        ("huge", "too_large"),
        ("long", "too_large"),
    ],
)
def test_each_fault_is_a_typed_outcome(fake_openai: FakeOpenAI, step: str, code: str) -> None:
    fake_openai.script(then=step)
    error = outcome(fake_openai)
    assert error.code == code
    assert error.reply is not None
    assert len(error.reply.text) <= 2000


@pytest.mark.parametrize("step", ["429", "500", "reset"])
def test_a_passing_fault_is_retried(fake_openai: FakeOpenAI, step: str) -> None:
    fake_openai.script(step)
    assert ask(fake_openai).text
    assert len(fake_openai.requests) == 2


@pytest.mark.parametrize(("step", "code"), [("hang", "timeout"), ("drip", "timeout"), ("429:50", "rate_limited")])
def test_one_deadline_bounds_hangs_drips_and_long_waits(fake_openai: FakeOpenAI, step: str, code: str) -> None:
    fake_openai.script(then=step)
    began = time.monotonic()
    error = outcome(fake_openai, timeout=0.6, max_retries=5)
    assert time.monotonic() - began < 3
    assert error.code == code
    if code == "timeout":
        assert error.reply is not None
        assert error.reply.prompt_tokens > 0, "a call that was given up may be billed"


def test_nobody_listening_is_unreachable(fake_openai: FakeOpenAI) -> None:
    error = outcome(fake_openai, base_url="http://127.0.0.1:9/v1", max_retries=0)
    assert error.code == "unreachable"
    assert "127.0.0.1:9" in error.message


@pytest.mark.parametrize(
    ("step", "tries", "left_out"),
    [
        ("no_json_schema", 2, ()),
        ("no_response_format", 3, ("response_format",)),
        ("no_max_tokens", 2, ("max_tokens",)),
        ("no_temperature", 2, ("temperature",)),
    ],
)
def test_what_a_server_does_not_understand_is_left_out_and_remembered(
    fake_openai: FakeOpenAI, step: str, tries: int, left_out: tuple[str, ...]
) -> None:
    fake_openai.script(then=step)

    proposer = OpenAIProposer("fake", settings(fake_openai))
    for _ in range(2):
        assert len(json.loads(asyncio.run(proposer.complete(REQUEST)).text)["rates"]) == 3
    assert len(fake_openai.requests) == tries + 1
    assert not set(left_out) & set(fake_openai.requests[-1])
    if "response" in step or "schema" in step:
        assert '"maxItems":3' in fake_openai.requests[-1]["messages"][-1]["content"], "the schema moves into the prompt"


@pytest.mark.parametrize(
    "ignored", ["prose", "fenced", "in_prose", "wrong_length", '{"rates": ["1", 2, 3]}', '{"other": []}', "[1, 2, 3]"]
)
def test_a_server_that_ignores_the_schema_gets_it_in_the_prompt(fake_openai: FakeOpenAI, ignored: str) -> None:
    """HTTP 200 and unconstrained: what vLLM does with a field it does not know."""
    fake_openai.script("good", ignored)
    proposer = OpenAIProposer("fake", settings(fake_openai))
    for _ in range(4):
        asyncio.run(proposer.complete(REQUEST))
    spelled = ['"maxItems":3' in request["messages"][-1]["content"] for request in fake_openai.requests]
    assert spelled == [False, False, True, True]
    assert all(request["response_format"]["type"] == "json_schema" for request in fake_openai.requests), "it may still help"


def test_bounds_of_numbers_are_no_sign_of_a_server_without_constraints(fake_openai: FakeOpenAI) -> None:
    fake_openai.script("out_of_range")
    proposer = OpenAIProposer("fake", settings(fake_openai))
    for _ in range(2):
        asyncio.run(proposer.complete(REQUEST))
    assert "JSON schema" not in fake_openai.requests[1]["messages"][-1]["content"]


def test_lengths_of_strings_stay_out_of_a_strict_schema(fake_openai: FakeOpenAI) -> None:
    text = {"type": "string", "minLength": 1, "maxLength": 300}
    schema = {"type": "object", "properties": {"lesson": text}, "required": ["lesson"], "additionalProperties": False}
    fake_openai.script("good", "prose")
    proposer = OpenAIProposer("fake", settings(fake_openai))
    for _ in range(3):
        asyncio.run(proposer.complete(replace(REQUEST, schema=schema)))
    sent = fake_openai.requests[0]["response_format"]["json_schema"]["schema"]
    assert sent == {**schema, "properties": {"lesson": {"type": "string"}}}
    assert '"maxLength":300' in fake_openai.requests[2]["messages"][-1]["content"], "said where it can be said"


def test_a_refused_request_changes_nothing_for_the_next(fake_openai: FakeOpenAI) -> None:
    fake_openai.script("400", "400", "400")
    proposer = OpenAIProposer("fake", settings(fake_openai))
    with pytest.raises(CallError):
        asyncio.run(proposer.complete(REQUEST))
    asyncio.run(proposer.complete(REQUEST))
    assert fake_openai.requests[-1]["response_format"]["type"] == "json_schema"


def test_the_key_is_nowhere_but_in_the_header(fake_openai: FakeOpenAI, caplog: pytest.LogCaptureFixture) -> None:
    fake_openai.script("401", "reset", "good")
    configured = settings(fake_openai)
    with caplog.at_level(logging.DEBUG):
        outcome(fake_openai)
        ask(fake_openai)
    proposer = OpenAIProposer("fake", configured)
    everything = [caplog.text, repr(configured), str(configured), repr(proposer), configured.model_dump_json()]
    assert not any(KEY in text for text in everything)


@pytest.mark.parametrize("key", ["token", "max", "response_format", "max_completion_tokens", "temperature"])
@pytest.mark.parametrize("step", ["no_json_schema", "no_max_tokens", "no_temperature"])
def test_a_key_that_occurs_in_a_refusal_changes_nothing(fake_openai: FakeOpenAI, step: str, key: str) -> None:
    fake_openai.script(then=step)
    assert ask(fake_openai, api_key=key).text
    assert len(fake_openai.requests) == 2


def test_a_refusal_is_judged_as_a_whole_and_told_in_part(fake_openai: FakeOpenAI) -> None:
    fake_openai.script(f"400:{'the request was ' * 40}refused: seed is unknown")
    assert ask(fake_openai).text
    fake_openai.script(then=f"400:{'x' * 470}{KEY}")
    error = outcome(fake_openai)
    assert len(error.message) < 600
    assert KEY[:4] not in error.message, "half a key, left by the cut"


@pytest.mark.parametrize(("key", "told"), [("none", "none of them"), ("sk-no-key-required", "*** none")])
def test_a_placeholder_takes_no_ordinary_word_with_it(fake_openai: FakeOpenAI, key: str, told: str) -> None:
    fake_openai.script(then=f"400:{key} none of them fits")
    assert told in outcome(fake_openai, api_key=key).message


def test_the_environments_key_is_not_sent(fake_openai: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-environment")
    ask(fake_openai, api_key=None)
    assert fake_openai.keys == ["Bearer none"]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "openai"},
        {"base_url": "file:///etc/passwd"},
        {"base_url": "http://user:pass@127.0.0.1/v1"},
        {"base_url": "ftp://127.0.0.1"},
        {"base_url": "http://"},
        {"timeout": 0},
        {"price_prompt": -1},
        {"temperature": float("nan")},
        {"kind": "telepathy"},
        {"colour": "red"},
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ProposerSettings(**{"api_key": KEY, **fields})
    assert KEY not in str(caught.value)
    assert "user:pass" not in str(caught.value)


# -- reading a reply ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        '\n {"a": 1}\n',
        '```json\n{"a": 1}\n```',
        'Sure:\n```\n{"a": 1}\n```\nDone.',
        'First {"b": 2}, no, better: {"a": 1}.',
        '<think>{"b": 2}</think>{"a": 1}',
        'Braces { like this } come first. {"a": 1}',
    ],
)
def test_extract_finds_the_object(text: str) -> None:
    assert extract(text) == {"a": 1}


@pytest.mark.parametrize(
    "text", ["", "no", "{", "[1, 2]", '{"a": }', "[" * 10_000, '{"a":' * 10_000, "{" * 100_000, '<think>{"a": 1}']
)
def test_extract_refuses_the_rest(text: str) -> None:
    with pytest.raises(NotJsonError):
        extract(text)


@pytest.mark.parametrize("text", ['{"a": NaN}', 'x {"a": -Infinity}', '```json\n{"a": Infinity}\n```'])
def test_extract_refuses_numbers_json_does_not_have(text: str) -> None:
    with pytest.raises(NonFiniteError):
        extract(text)


# -- local -------------------------------------------------------------------------------------------------------------
class Pool:
    """A pool whose only worker is this object: it answers, raises or hangs as told."""

    def __init__(self, does: Any) -> None:
        self.does = does
        self.asked: list[ProposeRequest] = []

    async def run(self, session: Session, request: ProposeRequest, on_progress: Any = None) -> ProposeResult:
        assert (session, on_progress) == (SESSION, None)
        self.asked.append(request)
        if isinstance(self.does, Exception):
            raise self.does
        if self.does == "hang":
            await asyncio.sleep(60)
        return ProposeResult(**self.does)

    async def close(self) -> None: ...


def local(does: Any, **fields: Any) -> tuple[Reply, Pool]:
    pool = Pool(does)
    proposer = proposers.create("local", ProposerSettings(**fields), pool=pool, session=SESSION)
    return asyncio.run(proposer.complete(REQUEST)), pool


def test_local_asks_the_worker() -> None:
    reply, pool = local({"text": "{}", "model": "smol", "prompt_tokens": 5, "completion_tokens": 2, "seconds": 0.5})
    assert reply == Reply("{}", "smol", 5, 2, 0.5, 0.0)
    (asked,) = pool.asked
    assert asked.to_json() == {
        "messages": list(REQUEST.messages),
        "reply_schema": SCHEMA,
        "temperature": 0.8,
        "max_tokens": 200,
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("does", "code"),
    [
        (WorkerError("the worker died three times"), "server_error"),
        (OutOfMemoryError("no memory"), "server_error"),
        (WorkerError("too short", code="truncated"), "truncated"),
        ("hang", "timeout"),
    ],
)
def test_local_failures_are_typed(does: Any, code: str) -> None:
    with pytest.raises(CallError) as caught:
        local(does, timeout=0.2)
    assert caught.value.code == code


# -- replay ------------------------------------------------------------------------------------------------------------
def test_replay_repeats_calls_and_failures_by_number(tmp_path: Path) -> None:
    rows = [
        {"sequence": 2, "operator": "mutate", "reply": "", "outcome": "timeout", "detail": "no answer", "prompt_tokens": 9},
        {"sequence": 1, "operator": "mutate", "reply": '{"a": 1}', "outcome": "invalid", "model": "gpt", "completion_tokens": 4},
        {"sequence": 3, "operator": "select", "reply": "{}", "outcome": "ok"},
    ]
    path = tmp_path / "calls.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    replayed = proposers.create("replay", ProposerSettings(kind="replay", recording=path), pool=Pool({}), session=SESSION)

    def call(sequence: int, operator: str = "mutate") -> Reply:
        return asyncio.run(replayed.complete(replace(REQUEST, sequence=sequence, operator=operator)))

    assert call(1) == Reply('{"a": 1}', "gpt", 0, 4, 0.0)
    for sequence, operator, code in [(2, "mutate", "timeout"), (3, "mutate", "unreachable"), (4, "mutate", "unreachable")]:
        with pytest.raises(CallError) as caught:
            call(sequence, operator)
        assert caught.value.code == code
    assert call(3, "select").text == "{}"


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"operator": "mutate"}',
        '{"operator": "mutate", "reply": "", "outcome": "bored"}',
        '{"operator": "mutate", "reply": "", "prompt_tokens": "many"}',
    ],
)
def test_a_broken_recording_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text('{"operator": "mutate", "reply": "{}"}\n' + line)
    with pytest.raises(ConfigError, match="line 2"):
        proposers.create("replay", ProposerSettings(kind="replay", recording=path), pool=Pool({}), session=SESSION)


@pytest.mark.parametrize("recording", [None, Path("/nowhere/calls.jsonl")])
def test_a_missing_recording_is_a_config_error(recording: Path | None) -> None:
    with pytest.raises(ConfigError, match="recording"):
        proposers.create("replay", ProposerSettings(kind="replay", recording=recording), pool=Pool({}), session=SESSION)


def test_proposers_import_neither_torch_nor_the_sdk() -> None:
    code = (
        "import sys, selfpruner.proposers as p, selfpruner.proposers.llm_calls, selfpruner.operators.llm;"
        "p.create('x', p.ProposerSettings(kind='openai', model='m'), pool=None, session=None);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'openai', 'xgrammar')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
