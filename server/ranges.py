"""Bodies made of files, and byte ranges of them: RFC 9110, sections 13 and 14.

A body's entity tag is the sha256 of its source, so it is strong: the same tag, the same bytes. A request for one range gets it. A
request for several ranges, in another unit, or with a range that cannot be read gets the whole body, as the standard allows.

Starlette's FileResponse serves single files with ranges but is no substitute: it knows nothing of If-None-Match, refuses what the
standard lets a server ignore (reversed ranges, other units), and an archive of many files needs ranges too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import HTTPException, Request
from fastapi.responses import Response, StreamingResponse

CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=\s*(?:(\d{1,19})-(\d{1,19})?|-(\d{1,19}))\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FilePart:
    """A piece of a body: bytes, or the first ``size`` bytes of the file ``path``."""

    size: int
    data: bytes = b""
    path: Path | None = None

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        if self.path is None:
            yield self.data[start:stop]
            return
        with self.path.open("rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(CHUNK, stop - start))):
                start += len(chunk)
                yield chunk


def reply(request: Request, parts: Sequence[FilePart], *, tag: str, media_type: str, filename: str) -> Response:
    """The body, the range of it that the request asks for (206), or that the client has it already (304).

    Raises HTTPException 416 with the body's length when no byte of the range exists.
    """
    etag = f'"{tag}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "content-disposition": f'attachment; filename="{filename}"',
    }
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    size = sum(part.size for part in parts)
    start, stop, status = 0, size, 200
    # A range is defined for GET alone; one that is bound to another tag is of no use to whoever asks.
    if request.method == "GET" and request.headers.get("if-range", etag) == etag:
        asked = _range(request.headers.get("range"), size)
        if asked is not None:
            (start, stop), status = asked, 206
            headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["content-length"] = str(stop - start)
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    return StreamingResponse(_between(parts, start, stop), status, headers, media_type)


def _matches(header: str | None, etag: str) -> bool:
    """If-None-Match, by weak comparison."""
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return etag in tags or "*" in tags


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """The first byte and the one after the last; None: the whole."""
    match = _RANGE.fullmatch(header or "")
    if match is None:
        return None
    first, last, suffix = (None if number is None else int(number) for number in match.groups())
    if first is None:
        assert suffix is not None
        start, stop = max(size - suffix, 0), size
    else:
        if last is not None and last < first:
            return None
        start, stop = first, size if last is None else min(last + 1, size)
    if start >= stop:
        detail = f"There are {size} bytes, and the range {header} has none of them."
        raise HTTPException(416, detail, headers={"content-range": f"bytes */{size}"})
    return start, stop


def _between(parts: Sequence[FilePart], start: int, stop: int) -> Iterator[bytes]:
    offset = 0
    for part in parts:
        first, last = max(start - offset, 0), min(stop - offset, part.size)
        if first < last:
            yield from part.read(first, last)
        offset += part.size
