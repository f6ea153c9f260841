"""The proposer behind any OpenAI-compatible server: OpenAI, vLLM, SGLang, llama.cpp, Ollama.

Every failure becomes a CallError with a typed outcome. A call is bounded in time (one wall-clock deadline over all retries) and in
size (the body is read in pieces). A feature that a server does not understand, such as a JSON schema as the response format or
``max_tokens``, is left out after its first refusal, and that is remembered. A server that accepts the schema and ignores it (HTTP
200, unconstrained) gives itself away by the first reply that does not fit: from the repair turn on, the schema is also written into
the prompt. The key goes to ``base_url`` and nowhere else: redirects are not followed and the environment's OPENAI_API_KEY is not
read.

``openai`` is imported with the first call: it costs the API process memory that most jobs do not need.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from selfpruner.proposers.base import CallError, Reply, Request
from selfpruner.proposers.reply import follows
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.redaction import without_key

if TYPE_CHECKING:
    import httpx2
    import openai

MAX_BODY = 2 * 2**20  # bytes; a long chain of thought fits, a flood does not
MAX_TEXT = 100_000  # characters of the answer itself
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Dialect:
    """What the server understands."""

    response_format: str | None = "json_schema"
    tokens: str = "max_tokens"
    left_out: frozenset[str] = frozenset()
    spelled: bool = False  # the schema is written into the prompt, whatever response_format says

    def after(self, complaint: str) -> _Dialect | None:
        """The next thing to try when the server refused a request with ``complaint``; None when nothing is left."""
        if "max_completion_tokens" in complaint and self.tokens == "max_tokens":
            return replace(self, tokens="max_completion_tokens")
        following = {"json_schema": "json_object", "json_object": None}
        # Some servers quote the whole request, so a complaint that names the format is about the format.
        named = [name for name in ("temperature", "seed") if name not in self.left_out and name in complaint]
        if self.response_format in following and ("response_format" in complaint or not named):
            return replace(self, response_format=following[self.response_format])
        if named:
            return replace(self, left_out=self.left_out | {named[0]})
        return None


class OpenAIProposer:
    """Answers with chat completions of one model on one server."""

    def __init__(self, name: str, settings: ProposerSettings) -> None:
        self.name = name
        self.model = settings.model
        self._settings = settings
        self._dialect = _Dialect()

    def __repr__(self) -> str:
        return f"OpenAIProposer({self.name!r}, model={self.model!r})"

    async def complete(self, request: Request) -> Reply:
        call = _Call(self._settings, request)
        _CURRENT.set(call)
        try:
            async with asyncio.timeout(self._settings.timeout):
                # A client per call: nothing to close when a job ends or is cancelled, and a call takes seconds anyway.
                async with self._open() as client:
                    return await self._complete(client, request, call)
        except TimeoutError:
            raise call.out_of_time() from None

    async def _complete(self, client: openai.AsyncOpenAI, request: Request, call: _Call) -> Reply:
        dialect = self._dialect
        while True:
            try:
                body = await self._post(client, _arguments(self.model, request, dialect), call)
            except CallError:
                following = dialect.after(call.refusal) if call.status in (400, 422) else None
                if following is None:
                    raise
                dialect = following
            else:
                self._dialect = dialect
                reply = call.reply(body)
                if dialect.response_format == "json_schema" and not follows(reply.text, request.schema):
                    self._dialect = replace(dialect, spelled=True)
                return reply

    async def _post(self, client: openai.AsyncOpenAI, arguments: Mapping[str, Any], call: _Call) -> bytes:
        """The body of a 200. Raises CallError for everything else."""
        import httpx2
        import openai

        try:
            async with AsyncExitStack() as stack:
                response = await stack.enter_async_context(
                    client.chat.completions.with_streaming_response.create(
                        **arguments, extra_headers={"Accept-Encoding": "identity"}
                    )
                )
                body = bytearray()
                async for piece in response.iter_bytes(65_536):
                    body += piece
                    if len(body) > MAX_BODY:
                        raise call.error("too_large", f"The proposer sent more than {MAX_BODY:,} bytes; the rest was not read.")
                return bytes(body)
        except openai.APIStatusError as error:
            raise call.status_error(error.status_code, error.body if error.body is not None else error.message) from None
        except (openai.APITimeoutError, httpx2.TimeoutException):
            raise call.out_of_time() from None
        except (openai.APIConnectionError, httpx2.HTTPError, OSError) as error:
            why = type(error.__cause__ or error).__name__
            raise call.error(
                "unreachable", f"No answer from {self._settings.base_url} ({why}). Is the server running and base_url right?"
            ) from None
        except openai.OpenAIError as error:
            raise call.error("server_error", f"The proposer's client failed: {type(error).__name__}.") from None

    def _open(self) -> openai.AsyncOpenAI:
        import openai

        key = self._settings.api_key
        return openai.AsyncOpenAI(
            api_key=key.get_secret_value() if key else "none",
            base_url=self._settings.base_url,
            timeout=openai.Timeout(self._settings.timeout, connect=min(_CONNECT_SECONDS, self._settings.timeout)),
            max_retries=self._settings.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_on_response]}),
        )


class _Call:
    """One call: its clock, the last HTTP status, and the errors that carry its costs.

    ``refusal`` is what the server said last, word for word: to decide by, never to show. Messages of errors are shown and stored;
    the key is blanked in them.
    """

    def __init__(self, settings: ProposerSettings, request: Request) -> None:
        self.status = 0
        self.refusal = ""
        self._settings = settings
        self._request = request
        self._began = time.monotonic()

    def error(self, code: str, message: str, reply: Reply | None = None) -> CallError:
        return CallError(self._without_key(message), code=code, reply=reply or self._reply("", 0, 0))

    def out_of_time(self) -> CallError:
        # The server may bill what it read, so a cap on tokens counts the prompt of a call that was given up.
        lost = self._reply("", _estimate("".join(m["content"] for m in self._request.messages)), 0)
        seconds = f"{self._settings.timeout:g} s"
        if self.status == 429:
            return self.error("rate_limited", f"Still rate limited after {seconds}; wait, or lower the number of LLM offspring.")
        if self.status >= 500:
            return self.error("server_error", f"Only errors (HTTP {self.status}) for {seconds}; look at the proposer's own log.")
        return self.error("timeout", f"No answer within {seconds}; raise the proposer's timeout or use a faster model.", lost)

    def status_error(self, status: int, body: object) -> CallError:
        self.refusal = json.dumps(body, default=str, ensure_ascii=False)
        said = self._without_key(self.refusal)[:500]  # blanked before it is cut: half a key is told as little as a whole one
        if status == 429:
            return self.error("rate_limited", f"Rate limited (429) after {self._settings.max_retries} retries: {said}")
        if status >= 500:
            return self.error("server_error", f"HTTP {status} after {self._settings.max_retries} retries: {said}")
        if status == 408:
            return self.out_of_time()
        return self.error("rejected", f"The proposer refused the request with HTTP {status}; check key, model and base_url: {said}")

    def _without_key(self, text: str) -> str:
        return without_key(text, self._settings.api_key.get_secret_value() if self._settings.api_key else None)

    def reply(self, body: bytes) -> Reply:
        """Read a chat completion. Raises CallError unless it holds a whole, non-empty answer."""
        try:
            completion = json.loads(body)
            choice = completion["choices"][0]
            message = choice["message"]
            content, refusal, reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise self.error("server_error", "The reply was not a chat completion; base_url should end in /v1.") from None
        text = content if isinstance(content, str) else _joined(content)
        reply = self._usage(completion, text)
        if refusal or reason == "content_filter":
            raise self.error("refused", f"The model declined: {self._without_key(json.dumps(str(refusal or reason)))[:300]}", reply)
        if len(text) > MAX_TEXT:
            clipped = replace(reply, text=text[:2000])
            raise self.error("too_large", f"The reply has {len(text):,} characters; {MAX_TEXT:,} are allowed.", clipped)
        if reason == "length":
            limit = self._request.max_tokens
            raise self.error("truncated", f"The reply was cut at {limit} tokens; raise max_tokens or ask for fewer plans.", reply)
        if not text.strip():
            raise self.error("empty", "The reply had no text.", reply)
        return reply

    def _usage(self, completion: Mapping[str, object], text: str) -> Reply:
        """The reply with the server's own token counts; estimated where it gave none."""
        usage = completion.get("usage")
        counts = [usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")]
        sizes = ["".join(message["content"] for message in self._request.messages), text]
        prompt, answer = (
            count if isinstance(count, int) and count >= 0 else _estimate(size) for count, size in zip(counts, sizes, strict=True)
        )
        served = completion.get("model")
        return replace(
            self._reply(text, prompt, answer), model=served[:256] if isinstance(served, str) and served else self._settings.model
        )

    def _reply(self, text: str, prompt_tokens: int, completion_tokens: int) -> Reply:
        return Reply(
            text,
            self._settings.model,
            prompt_tokens,
            completion_tokens,
            time.monotonic() - self._began,
            self._settings.cost(prompt_tokens, completion_tokens),
        )


# The call that the current asyncio task is in: the client's hook has no other way to know.
_CURRENT: ContextVar[_Call] = ContextVar("selfpruner_llm_call")


def _arguments(model: str, request: Request, dialect: _Dialect) -> dict[str, object]:
    messages = [dict(message) for message in request.messages]
    formats: dict[str | None, object] = {
        "json_schema": {
            "type": "json_schema",
            "json_schema": {"name": request.operator, "strict": True, "schema": _strict(request.schema)},
        },
        "json_object": {"type": "json_object"},
    }
    options = {"temperature": request.temperature, "seed": request.seed}
    if dialect.spelled or dialect.response_format != "json_schema":
        messages[-1]["content"] += f"\n\nJSON schema of the answer: {json.dumps(request.schema, separators=(',', ':'))}"
    return {
        "model": model,
        "messages": messages,
        dialect.tokens: request.max_tokens,
        **{name: value for name, value in options.items() if name not in dialect.left_out},
        **({"response_format": formats[dialect.response_format]} if dialect.response_format else {}),
    }


def _strict(schema: object) -> object:
    """``schema`` without the lengths of strings: OpenAI refuses a strict schema that has them. Replies are validated anyway."""
    if isinstance(schema, dict):
        return {key: _strict(value) for key, value in schema.items() if key not in ("minLength", "maxLength")}
    return [_strict(value) for value in schema] if isinstance(schema, list) else schema


async def _on_response(response: httpx2.Response) -> None:
    """Hook of the HTTP client, called for every try: notes the status, bounds the body of an error (the SDK reads it whole)."""
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream: httpx2.AsyncByteStream) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for piece in self._stream:
                size += len(piece)
                if size > MAX_BODY:
                    return
                yield piece

        async def aclose(self) -> None:
            await self._stream.aclose()

    call = _CURRENT.get(None)
    if call is not None:
        call.status = response.status_code
    if response.status_code >= 300:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = Bounded(response.stream)


def _joined(content: object) -> str:
    """The text of a content given as a list of parts."""
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _estimate(text: str) -> int:
    """Tokens of ``text`` where the server gave no count; numbers take about one token for two characters."""
    return -(-len(text) // 2)
