"""Who is asking: bearer token -> owner, and the Host check that keeps web pages away from a server without tokens.

Tokens are compared in constant time, and all of them always, so timing tells neither a token nor which one matched.
"""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from selfpruner.errors import SelfprunerError
from server.settings import ServerSettings

# The owner of every job on a loopback server without tokens.
LOCAL_OWNER = "local"

_bearer = HTTPBearer(auto_error=False, description="Needed when the operator configured tokens.")


class AuthenticationError(SelfprunerError):
    """No token, or one that nobody has."""

    code = "invalid_token"
    type = "invalid_request_error"


def owner_of(token: str | None, settings: ServerSettings) -> str:
    """The owner of ``token``; raises AuthenticationError."""
    if not settings.owners:
        return LOCAL_OWNER
    given, matching_owner = (token or "").encode(), None
    for owner, secret in settings.owners.items():
        if hmac.compare_digest(given, secret.get_secret_value().encode()):
            matching_owner = owner
    if matching_owner is None:
        raise AuthenticationError("A valid token is needed: send the header 'Authorization: Bearer TOKEN' (CLI: SELFPRUNER_TOKEN).")
    return matching_owner


def trusted_host(host_header: str, settings: ServerSettings) -> bool:
    """False when a server without tokens is addressed by a foreign name: a web page that rebinds its DNS name to 127.0.0.1."""
    if settings.owners:
        return True
    name = host_header.rsplit(":", 1)[0] if not host_header.endswith("]") else host_header
    return name in ("127.0.0.1", "localhost", "[::1]", settings.host, f"[{settings.host}]")


def _owner(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> str:
    return owner_of(credentials.credentials if credentials else None, request.app.state.settings)


Owner = Annotated[str, Depends(_owner)]
