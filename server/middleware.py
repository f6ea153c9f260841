"""What surrounds every request: an id, a log line, a last resort for unexpected errors, and limits on the body.

Plain ASGI, because Starlette's BaseHTTPMiddleware would buffer event streams.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs
from server.errors import plain_error
from server.security import trusted_host
from server.settings import ServerSettings

log = logging.getLogger("selfpruner.http")

MAX_BODY = 1 << 20
MAX_DEPTH = 64
BODY_SECONDS = 30.0
REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)


class RequestContext:
    """Gives every reply an ``x-request-id`` (the client's, when it sent a plain one) and turns an unexpected exception into a 500
    whose message points at the log; the traceback is only there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        identity = sent if REQUEST_ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}"
        status, start = 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = identity
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        token = logs.request_id.set(identity)
        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("%s %s failed unexpectedly", scope["method"], scope["path"])
            if status:  # half a reply is out; only closing the connection can tell the client
                raise
            message = f"Something unexpected went wrong. The server's log has it under request {identity}."
            await plain_error(500, message, code="internal_error")(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] == "/healthz" else logging.INFO
            log.log(level, "%s %s %d %.1f ms", scope["method"], scope["path"], status, 1000 * (time.monotonic() - start))
            logs.request_id.reset(token)


class BodyGuard:
    """Refuses foreign Host names, bodies over MAX_BODY, bodies that are not JSON by type, and JSON nested deeper than MAX_DEPTH,
    before anything parses them. The whole body is read here, so what follows never sees a half one."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not trusted_host(headers.get("host", ""), self.settings):
            message = "This server has no tokens and answers only to its loopback names, such as http://127.0.0.1."
            await plain_error(403, message, code="untrusted_host")(scope, receive, send)
            return
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(headers, receive)
        except TimeoutError:
            message = f"The body did not arrive within {BODY_SECONDS:g} seconds."
            await plain_error(408, message, headers={"connection": "close"})(scope, receive, send)
            return
        except ClientDisconnect:
            return  # half a body is no request, and nobody is left to be told
        if body is None:
            message = f"The body is larger than {MAX_BODY} bytes. A request needs no more than a few kilobytes."
            await plain_error(413, message, headers={"connection": "close"})(scope, receive, send)
            return
        media = headers.get("content-type", "").split(";")[0].strip().lower()
        if body and media != "application/json":
            await plain_error(415, "Send the body as JSON, with the header 'Content-Type: application/json'.")(scope, receive, send)
            return
        if problem := json_problem(body):
            await plain_error(400, problem, code="invalid_json")(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


async def _read(headers: Headers, receive: Receive) -> bytes | None:
    """The whole body, or None when it is too large."""
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY:
        return None
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > MAX_BODY:
            return None
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def json_problem(body: bytes) -> str:
    """Why no parser should see this body, or "". Depth is counted on the brackets outside strings, without recursion."""
    depth = 0
    for byte in _STRING.sub(b"", body):
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                return f"The JSON is nested deeper than {MAX_DEPTH} levels."
        elif byte in b"]}":
            depth -= 1
    if not body:
        return ""
    try:
        json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return f"The body is not JSON: {error}."
    return ""


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")
