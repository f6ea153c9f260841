"""The proposer that needs no network and no key: the dense model of the job, on the worker that holds it."""

from __future__ import annotations

import asyncio
import time

from selfpruner.errors import SelfprunerError
from selfpruner.proposers.base import OUTCOMES, CallError, Reply, Request
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import ProposeRequest


class LocalProposer:
    """Sends each request to the pool as a ``propose`` task. Replies cost time and no money."""

    def __init__(self, name: str, settings: ProposerSettings, pool: WorkerPool, session: Session) -> None:
        self.name = name
        self.model = settings.model or str(session.config.get("model", ""))
        self._settings = settings
        self._pool = pool
        self._session = session

    async def complete(self, request: Request) -> Reply:
        began = time.monotonic()
        asked = ProposeRequest(
            messages=tuple(dict(message) for message in request.messages),
            reply_schema=dict(request.schema),
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            seed=request.seed,
        )

        def failed(code: str, message: str) -> CallError:
            return CallError(message, code=code, reply=Reply("", self.model, 0, 0, time.monotonic() - began))

        try:
            async with asyncio.timeout(self._settings.timeout):
                result = await self._pool.run(self._session, asked)
        except TimeoutError:
            raise failed(
                "timeout", f"The model wrote no reply within {self._settings.timeout:g} s; raise the proposer's timeout."
            ) from None
        except SelfprunerError as error:
            raise failed(error.code if error.code in OUTCOMES else "server_error", error.message) from error
        return Reply(result.text, result.model or self.model, result.prompt_tokens, result.completion_tokens, result.seconds)
