"""Every 4xx and 5xx as ``{"error": {message, type, param, code}}``, whoever raised it: us, pydantic, Starlette or nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from selfpruner import errors
from selfpruner.config import field_names
from server.schemas import JobRequest
from server.security import AuthenticationError


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    error: ErrorBody


# The first match counts, so classes come before their bases.
STATUS: Sequence[tuple[type[errors.SelfprunerError], int]] = (
    (AuthenticationError, 401),
    (errors.NotFoundError, 404),
    (errors.ConflictError, 409),
    (errors.DiskFullError, 507),
    (errors.CorruptCheckpointError, 500),
)

CODES: Mapping[int, str] = {
    400: "bad_request",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    503: "unavailable",
}


def error_reply(error: errors.SelfprunerError, status: int | None = None, headers: Mapping[str, str] | None = None) -> JSONResponse:
    if status is None and isinstance(error, errors.NotFoundError) and error.param is not None:
        status = 422  # the address exists; what a parameter refers to does not
    if status is None:
        status = next(
            (code for cls, code in STATUS if isinstance(error, cls)), 422 if error.type == "invalid_request_error" else 500
        )
    extra = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse({"error": error.to_dict()}, status_code=status, headers={**extra, **(headers or {})})


def plain_error(status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": message, "type": kind, "param": None, "code": code or CODES.get(status, "http_error")}
    return JSONResponse({"error": body}, status_code=status, headers=dict(headers or {}))


def responses(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI entries of the errors a route can end in, besides 401 and 422."""
    return {
        status: {"model": ErrorReply, "description": HTTPStatus(status).phrase} for status in sorted({401, 422, 500, *statuses})
    }


def register(app: FastAPI) -> None:
    app.add_exception_handler(errors.SelfprunerError, _ours)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)


async def _ours(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.SelfprunerError)
    return error_reply(error)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        404: "There is nothing at this address. See /openapi.json for the ones that exist.",
        405: f"{request.method} is not possible here; the Allow header lists what is.",
    }.get(error.status_code, str(error.detail))
    return plain_error(error.status_code, message, headers=error.headers)


async def _validation(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # Where the value came from (body, query, path, header) is the first part of its place; clients know it.
    problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
    fields = field_names(JobRequest) if error.errors()[0]["loc"][:1] == ("body",) else ()
    return error_reply(errors.from_problems(problems, fields))
