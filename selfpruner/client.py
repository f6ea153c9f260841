"""A client of the HTTP API: plain dicts in and out, see :mod:`selfpruner.store.objects`; errors as the same typed exceptions the
server raised.

with Client("http://127.0.0.1:8000") as client:
    job = client.submit({"model": "smollm2-135m", "rate": 0.2})
    for name, data in client.follow(job["id"]):
        ...
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, TypeVar, cast
from urllib.parse import quote

import httpx

from selfpruner.errors import (
    ConfigError,
    ConflictError,
    CorruptCheckpointError,
    DiskFullError,
    NotFoundError,
    SelfprunerError,
    disk_errors,
    from_dict,
)
from selfpruner.files import manifest
from selfpruner.store.objects import (
    CandidateObject,
    CheckpointObject,
    EventObject,
    FileObject,
    Item,
    JobObject,
    ListObject,
    ModelObject,
)

Reply = TypeVar("Reply")

PART = ".part"  # ends the name of a file that is not complete yet
FINISHED = ("succeeded", "failed", "cancelled")
DEFAULT_URL = "http://127.0.0.1:8000"

# A stream is silent for at most the server's keep-alive interval; longer means that the connection is dead.
STREAM_SILENCE = 45.0
# Retries count the failures since something last arrived, which libraries for retries, counting attempts, do not.
# How often in a row a broken stream is opened again, with pauses of up to five seconds: about a minute.
FOLLOW_RETRIES = 12


class UnreachableError(SelfprunerError):
    """No server answers, or what answers is not ours."""

    code = "server_unreachable"


class RequestError(SelfprunerError):
    """A request the server refused for another reason than its values: no token, a body too large, an unknown address."""

    code = "bad_request"
    type = "invalid_request_error"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One message of an event stream."""

    event: str = "message"
    data: str = ""
    id: str | None = None


class Client:
    """``token`` is the bearer token when the server wants one; ``transport`` replaces the network in tests.

    Every method raises the server's error as its own type (see :mod:`selfpruner.errors`), or UnreachableError.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self._retries = retries
        self._sleep = sleep
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise ConfigError("The token holds characters that no token has. Check SELFPRUNER_TOKEN.", param="token")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, transport=transport, trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            raise UnreachableError(f"{url!r} is no server address: {error}. Use one like {DEFAULT_URL}.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # -- jobs ----------------------------------------------------------------------------------------------------------
    def submit(
        self, config: Mapping[str, object], *, metadata: Mapping[str, str] | None = None, idempotency_key: str | None = None
    ) -> JobObject:
        """Queue a search: the fields of SearchConfig. Sent again after a lost connection, it is still one job."""
        body = {**config, **({"metadata": dict(metadata)} if metadata else {})}
        headers = {"idempotency-key": idempotency_key or uuid.uuid4().hex}
        return self._json(JobObject, "POST", "/v1/jobs", json=body, headers=headers)

    def get(self, job_id: str) -> JobObject:
        return self._json(JobObject, "GET", f"/v1/jobs/{_id(job_id)}")

    def list(self, after: str | None = None, limit: int = 20, status: str | None = None) -> ListObject[JobObject]:
        """One page, newest first."""
        given = {"after": after, "limit": limit, "status": status}
        params = {name: value for name, value in given.items() if value is not None}
        return self._json(ListObject[JobObject], "GET", "/v1/jobs", params=params)

    def cancel(self, job_id: str) -> JobObject:
        return self._act(job_id, "cancel")

    def pause(self, job_id: str) -> JobObject:
        return self._act(job_id, "pause")

    def resume(self, job_id: str) -> JobObject:
        return self._act(job_id, "resume")

    def candidates(self, job_id: str, order: Literal["generation", "fitness"] = "generation") -> Iterator[CandidateObject]:
        """All candidates, page by page."""
        return self._pages(ListObject[CandidateObject], f"/v1/jobs/{_id(job_id)}/candidates", {"order": order})

    def candidate(self, job_id: str, plan: str) -> CandidateObject:
        """One candidate, by its hash or a beginning that only it has."""
        return self._json(CandidateObject, "GET", f"/v1/jobs/{_id(job_id)}/candidates/{_id(plan)}")

    def checkpoints(self, job_id: str) -> Iterator[CheckpointObject]:
        return self._pages(ListObject[CheckpointObject], f"/v1/jobs/{_id(job_id)}/checkpoints", {})

    def download(self, job_id: str, checkpoint_id: str, folder: Path) -> Path:
        """Fetch a checkpoint's files into ``folder``, the manifest last, so that a folder that has one is complete.

        A connection that breaks is taken up where it broke; so is a download that was interrupted, by the same call again.
        Raises CorruptCheckpointError when what arrived does not match its sha256, ConfigError when the folder holds something else.
        """
        base = f"/v1/jobs/{_id(job_id)}/checkpoints/{_id(checkpoint_id)}/files"
        files = self._json(ListObject[FileObject], "GET", base)["data"]
        # What an interrupted download left: listed files, whole or in part, but not the last one.
        begun = {folder / name for file in files[:-1] for name in (file["id"], file["id"] + PART)} | {
            folder / (files[-1]["id"] + PART)
        }
        if any(path not in begun for path in folder.rglob("*") if not path.is_dir()) or folder.is_file():
            raise ConfigError(f"{folder} is not empty. Name a new folder.", param="folder")
        for file in files:
            target = folder / file["id"]
            if not target.resolve().is_relative_to(folder.resolve()):
                raise CorruptCheckpointError(f"The server lists a file outside the checkpoint: {file['id']!r}.")
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    self._fetch(f"{base}/{quote(file['id'])}", target, file)
                elif not _is(target, file):
                    raise CorruptCheckpointError(f"{target} is another file of that name. Remove it, or name a new folder.")
        return folder

    def _fetch(self, path: str, target: Path, file: FileObject) -> None:
        """Fetch one file; what was fetched before it broke stays in a file beside it."""
        part, failures = target.with_name(target.name + PART), 0
        while True:
            have = part.stat().st_size if part.exists() else 0
            if 0 < have >= file["bytes"]:
                break
            headers = {"range": f"bytes={have}-", "if-range": f'"{file["sha256"]}"'} if have else {}
            try:
                with self._http.stream("GET", path, headers=headers) as reply:
                    if reply.is_error:
                        reply.read()
                        raise _error(reply)
                    goes_on = reply.status_code == 206 and reply.headers.get("content-range", "").startswith(f"bytes {have}-")
                    with part.open("ab" if goes_on else "wb") as out:
                        for chunk in reply.iter_bytes():
                            out.write(chunk)
                break
            except httpx.TransportError as error:
                came = part.exists() and part.stat().st_size > have
                failures = 0 if came else failures + 1
                if failures > self._retries:
                    raise self._unreachable(error) from None
                self._sleep(0.2 * 2**failures)
        if not _is(part, file):
            part.unlink()
            raise CorruptCheckpointError(f"{target.name} arrived damaged. Fetch it again.")
        part.rename(target)

    def events(self, job_id: str, after: int = 0) -> Iterator[EventObject]:
        """The events so far, those after number ``after``."""
        return self._pages(ListObject[EventObject], f"/v1/jobs/{_id(job_id)}/events", {"after": after})

    def models(self) -> ListObject[ModelObject]:
        return self._json(ListObject[ModelObject], "GET", "/v1/models")

    # -- following -----------------------------------------------------------------------------------------------------
    def follow(self, job_id: str, after: int = 0) -> Iterator[tuple[str, EventObject | JobObject]]:
        """``(name, data)`` of everything that happens until the job has finished.

        Events come once each, in order, under their type; ``("job", job)`` comes whenever its status or progress changed,
        and last. A lost connection is opened again where it broke, so a restart of the server goes unnoticed; UnreachableError
        when nobody answers for about a minute.
        """
        path, failures = f"/v1/jobs/{_id(job_id)}/events", 0
        while True:
            try:
                for message in self._messages(path, after):
                    failures = 0
                    data = json.loads(message.data)
                    if message.id is not None:
                        after = int(message.id)
                    yield message.event, data
                    if message.event == "job" and data["status"] in FINISHED:
                        return
                # The stream ended early because the server stops, or 204: the job had finished when it was opened.
                job = self.get(job_id)
                if job["status"] in FINISHED:
                    yield "job", job
                    return
            except (httpx.TransportError, UnreachableError) as error:
                failures += 1
                if failures > FOLLOW_RETRIES:
                    raise error if isinstance(error, UnreachableError) else self._unreachable(error) from None
            self._sleep(min(0.5 * 2.0**failures, 5.0))

    def _messages(self, path: str, after: int) -> Iterator[ServerSentEvent]:
        headers = {"accept": "text/event-stream", **({"last-event-id": str(after)} if after else {})}
        timeout = httpx.Timeout(self._http.timeout.connect, read=STREAM_SILENCE)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as reply:
            if reply.is_error:
                reply.read()
                raise _error(reply)
            yield from parse_stream(_lines(reply.iter_bytes()))

    # -- requests ------------------------------------------------------------------------------------------------------
    def _act(self, job_id: str, action: str) -> JobObject:
        return self._json(JobObject, "POST", f"/v1/jobs/{_id(job_id)}/{action}", retry=False)

    def _pages(self, kind: type[ListObject[Item]], path: str, params: Mapping[str, str | int]) -> Iterator[Item]:
        params = {"limit": 100, **params}
        while True:
            page = self._json(kind, "GET", path, params=params)
            yield from page["data"]
            if not page["has_more"]:
                return
            params = {**params, "after": page["data"][-1]["id"]}

    def _json(
        self,
        _kind: type[Reply],
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        json: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        retry: bool = True,
    ) -> Reply:
        """What the server answers. Of its fields the server's word is taken: a newer one may send more."""
        for attempt in range(self._retries + 1):
            try:
                reply = self._http.request(method, path, params=params, json=json, headers=headers)
                break
            except httpx.TransportError as error:
                if not retry or attempt == self._retries or isinstance(error, httpx.UnsupportedProtocol):
                    raise self._unreachable(error) from None
                self._sleep(0.2 * 2**attempt)
        if reply.is_error:
            raise _error(reply)
        try:
            body = reply.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise UnreachableError(f"What answers at {self.url} is not a selfpruner server.")
        return cast(Reply, body)

    def _unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"No answer from {self.url} ({type(error).__name__}). Start a server with `selfpruner serve`, or name it with --url."
        )


@dataclass
class _Draft:
    event: str = "message"
    data: list[str] = field(default_factory=list)
    id: str | None = None


def parse_stream(lines: Iterator[str]) -> Iterator[ServerSentEvent]:
    """Messages of a text/event-stream (HTML standard, 9.2.6). One that the connection cut short is dropped, as it must be.

    httpx-sse is no substitute: it repeats the last id on messages that have none, and makes a message of every keep-alive.
    """
    draft = _Draft()
    for line in lines:
        if not line:
            if draft.data:
                yield ServerSentEvent(draft.event, "\n".join(draft.data), draft.id)
            draft = _Draft()
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            draft.event = value
        elif name == "data":
            draft.data.append(value)
        elif name == "id":
            draft.id = value


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Complete lines. Not httpx's ``iter_lines``: that also splits at characters like U+2028, which JSON may hold."""
    rest = b""
    for chunk in chunks:
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")


# Codes are finer than exceptions; where no class has the code, the status says what kind of error it is.
BY_STATUS: Mapping[int, type[SelfprunerError]] = {404: NotFoundError, 409: ConflictError, 422: ConfigError, 507: DiskFullError}


def _error(reply: httpx.Response) -> SelfprunerError:
    try:
        body = reply.json()["error"]
        error = from_dict(body)
        if type(error) is SelfprunerError:
            kind = BY_STATUS.get(reply.status_code, RequestError if reply.is_client_error else SelfprunerError)
            error = kind(error.message, code=error.code, param=error.param)
        return error
    except (ValueError, KeyError, TypeError, AttributeError):
        return UnreachableError(f"{reply.url.copy_with(query=None)} answered {reply.status_code}, not as a selfpruner server does.")


def _is(path: Path, file: FileObject) -> bool:
    """Whether ``path`` has the bytes of a file that the server lists."""
    return path.stat().st_size == file["bytes"] and manifest.sha256(path) == file["sha256"]


def _id(identity: str) -> str:
    """An id as one segment of a path, whatever it holds."""
    return quote(identity, safe="")
