"""``/v1/jobs/{id}/events``: what happened, as a JSON page or, with ``Accept: text/event-stream``, as it happens.

The stream carries two kinds of messages. Each event is one message: its name is the event's type, its ``id`` the event's, its
data the same object as in the list; ``Last-Event-ID`` continues after it, so nothing is lost or seen twice. The other kind is
``job``, without an id: the job object, whenever its status or progress changed. The stream ends after the last event of a
finished job. Asked again then, the server answers 204, which tells browsers not to come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool

from selfpruner.errors import ConfigError
from selfpruner.store.feed import Feed, named
from selfpruner.store.objects import EventObject, ListObject, event_object, list_object
from selfpruner.store.store import Store
from server.errors import responses
from server.notifications import News
from server.routes.dependencies import Limit, OwnJob, TheRunner, TheStore
from server.runner import Runner

router = APIRouter(prefix="/v1/jobs/{job_id}/events", tags=["events"])

KEEP_ALIVE_SECONDS = 15.0
# Events wake a stream at once; progress, which is no event, is looked at this often.
PROGRESS_SECONDS = 0.5
RETRY_MILLISECONDS = 1000
MAX_SEQUENCE = 2**63 - 1


@router.get(
    "",
    response_model=ListObject[EventObject],
    responses={
        **responses(404),
        200: {
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
            "description": "A page, or the stream when the request accepts text/event-stream",
        },
        204: {"description": "The job has finished and the stream was read to its end"},
    },
)
async def list_events(
    job: OwnJob,
    store: TheStore,
    runner: TheRunner,
    request: Request,
    after: Annotated[int, Query(ge=0, le=MAX_SEQUENCE, description="the last id of the page before")] = 0,
    limit: Limit = 20,
    last_event_id: Annotated[str | None, Header(description="stream only: go on after this event")] = None,
) -> object:
    if "text/event-stream" not in request.headers.get("accept", "").lower():
        page = await run_in_threadpool(store.events, job.id, after, limit)
        return list_object([event_object(event) for event in page.data], page.has_more)
    if last_event_id:
        after = _sequence(last_event_id)
    if job.finished and not (await run_in_threadpool(store.events, job.id, after, 1)).data and last_event_id:
        return Response(status_code=204)
    return StreamingResponse(
        _stream(store, request.app.state.news, runner, job.id, after),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


def _sequence(last_event_id: str) -> int:
    if not (last_event_id.isascii() and last_event_id.isdigit() and int(last_event_id[:20]) <= MAX_SEQUENCE):
        raise ConfigError("Last-Event-ID must be the id of an event of this job.", param="last-event-id")
    return int(last_event_id)


async def _stream(store: Store, news: News, runner: Runner, job_id: str, after: int) -> AsyncIterator[bytes]:
    feed = Feed(store, job_id, after)
    spoke = time.monotonic()
    with news.subscribe(job_id) as woken:
        yield format_sse_event(retry=RETRY_MILLISECONDS)
        while not runner.stopping.is_set():
            woken.clear()
            happened = await run_in_threadpool(feed.look)
            for each in happened:
                number = str(each["id"]) if each["object"] == "event" else None
                yield format_sse_event(event=named(each), id=number, data_str=to_json(each).decode())
            if not happened:
                if time.monotonic() - spoke < KEEP_ALIVE_SECONDS:
                    await _first_of(woken, runner.stopping, timeout=PROGRESS_SECONDS)
                    continue
                yield KEEPALIVE_COMMENT
            spoke = time.monotonic()
            if feed.ended:
                return


async def _first_of(*events: asyncio.Event, timeout: float) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
