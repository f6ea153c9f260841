"""A model behind a running OpenAI-compatible server, such as vLLM's, timed from outside by streamed completions.

Prompts are token ids, new ones for every request, because servers keep what they have read. A request always writes all its tokens
(``ignore_eos``). Seconds are those of a user: they include HTTP, the queue and the tokenizer.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from selfpruner.errors import BenchmarkError, ConfigError
from selfpruner.redaction import without_key
from selfpruner.timing.tasks import DecodeRequest, DecodeResult, PrefillRequest, PrefillResult

# No server answers for this long before it is taken for dead; reading a long prompt on a CPU takes a while.
TIMEOUT = 600.0


@dataclass(slots=True)
class _Reply:
    """When tokens of one request arrived: (seconds since the clock's start, tokens so far)."""

    arrivals: list[tuple[float, int]] = field(default_factory=list)

    def tokens_at(self, moment: float) -> int:
        return max((count for when, count in self.arrivals if when <= moment), default=0)


class Server:
    """One model of one server. ``vocabulary`` bounds the token ids of prompts."""

    def __init__(self, url: str, name: str, vocabulary: int, *, key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url} is no address. Write for example --url http://127.0.0.1:8000/v1", param="url")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url, self._key = url.rstrip("/"), key
        self._client = httpx.AsyncClient(headers=headers, timeout=TIMEOUT, trust_env=False)
        self._name = name
        self._vocabulary = vocabulary
        self._draw = random.Random(0)

    async def close(self) -> None:
        await self._client.aclose()

    async def model(self) -> str:
        """The name under which the server knows the model: the given one if it is served, else the only one there is.

        Raises BenchmarkError when nobody answers, ConfigError when the server has several others.
        """
        try:
            reply = await self._client.get(f"{self._url}/models")
            reply.raise_for_status()
            served = [str(row["id"]) for row in reply.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{self._url}/models does not answer as an OpenAI-compatible server would ({_told(error)}). Start the server, and "
                "give its address up to /v1.",
                param="url",
            ) from None
        if self._name not in served:
            if len(served) != 1:
                raise ConfigError(f"{self._url} does not serve {self._name}, but {', '.join(served) or 'nothing'}.", param="url")
            self._name = served[0]
        return self._name

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        """Seconds until the one token that was asked for arrived; they are both the reading time and the time to first token."""
        (reply,), _ = await self._requests(1, request.tokens, 1)
        seconds = reply.arrivals[0][0]
        return PrefillResult(seconds=seconds, first_token=seconds)

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        """What arrived, and in how long, after every one of the requests had its first token."""
        replies, ended = await self._requests(request.batch, request.prompt, request.new_tokens + 1)
        started = max(reply.arrivals[0][0] for reply in replies)
        tokens = sum(request.new_tokens + 1 - reply.tokens_at(started) for reply in replies)
        if tokens < 1 or ended <= started:
            raise BenchmarkError(
                f"{self._url} sent its tokens all at once, so writing cannot be timed. Ask for more new tokens, and see that "
                "nothing between here and the server holds streams back."
            )
        return DecodeResult(tokens=tokens, seconds=ended - started)

    async def _requests(self, count: int, prompt: int, new_tokens: int) -> tuple[list[_Reply], float]:
        """Send ``count`` at once; their replies, and seconds until the last was complete."""
        bodies = [
            {
                "model": self._name,
                "prompt": [self._draw.randrange(self._vocabulary) for _ in range(prompt)],
                "max_tokens": new_tokens,
                "min_tokens": new_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
            for _ in range(count)
        ]
        started = time.perf_counter()
        replies = await asyncio.gather(*(self._request(body, new_tokens, started) for body in bodies))
        return replies, max(reply.arrivals[-1][0] for reply in replies)

    async def _request(self, body: Mapping[str, object], wanted: int, started: float) -> _Reply:
        reply = _Reply()
        async with self._stream(body) as lines:
            async for line in lines:
                if not line.startswith("data:") or (text := line[5:].strip()) == "[DONE]":
                    continue
                now = time.perf_counter() - started
                chunk = json.loads(text)
                if "error" in chunk:
                    raise BenchmarkError(f"{self._url} failed: {self._said(str(chunk['error']))}")
                usage = (chunk.get("usage") or {}).get("completion_tokens")
                before = reply.arrivals[-1][1] if reply.arrivals else 0
                # Without usage in every chunk, a chunk is one token.
                count = int(usage) if usage is not None else before + bool(chunk.get("choices"))
                if count > before:
                    reply.arrivals.append((now, count))
        if not reply.arrivals or reply.arrivals[-1][1] != wanted:
            counted = reply.arrivals[-1][1] if reply.arrivals else 0
            raise BenchmarkError(
                f"{self._url} wrote {counted} of {wanted} tokens. The server must know ignore_eos and have room for prompt and new "
                "tokens."
            )
        return reply

    @asynccontextmanager
    async def _stream(self, body: Mapping[str, object]) -> AsyncIterator[AsyncIterator[str]]:
        try:
            async with self._client.stream("POST", f"{self._url}/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise BenchmarkError(f"{self._url} refused a completion with {response.status_code}: {self._said(text)}")
                yield response.aiter_lines()
        except (httpx.HTTPError, ValueError) as error:
            raise BenchmarkError(f"{self._url} broke off ({_told(error)}). See the server's log.") from None

    def _said(self, text: str) -> str:
        return without_key(text, self._key)[:500]  # blanked before it is cut: half a key is told as little as a whole one


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__
