"""``/v1/models``: what a request may name as its model."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request

from selfpruner.catalogue import EMBEDDED_MODELS
from selfpruner.store.objects import ListObject, ModelObject, list_object
from server.admission import local_models
from server.errors import responses
from server.security import Owner

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", responses=responses())
def list_models(request: Request, _owner: Owner) -> ListObject[ModelObject]:
    """Embedded models, those below the server's model root, and the hub ids (patterns) it allows; not paged."""
    settings = request.app.state.settings
    listed = [_model(name, "embedded", text) for name, text in EMBEDDED_MODELS.items()]
    listed += [_model(name, "folder", "on the server's disk") for name in local_models(settings)]
    listed += [_model(name, "hub", "fetched from the Hugging Face hub") for name in settings.hub_ids]
    return list_object(listed)


def _model(name: str, source: Literal["embedded", "folder", "hub"], description: str) -> ModelObject:
    return {"id": name, "object": "model", "source": source, "description": description}
