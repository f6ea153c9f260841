"""``/v1/models``: what a request may name as its model."""

from __future__ import annotations

from fastapi import APIRouter, Request

from selfpruner.catalogue import EMBEDDED_MODELS
from server.admission import local_models
from server.errors import responses
from server.schemas import ListObject, ModelObject
from server.security import Owner

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", responses=responses())
def list_models(request: Request, _owner: Owner) -> ListObject[ModelObject]:
    """Embedded models, those below the server's model root, and the hub ids (patterns) it allows; not paged."""
    settings = request.app.state.settings
    listed = [ModelObject(id=name, source="embedded", description=text) for name, text in EMBEDDED_MODELS.items()]
    listed += [ModelObject(id=name, source="folder", description="on the server's disk") for name in local_models(settings)]
    listed += [ModelObject(id=name, source="hub", description="fetched from the Hugging Face hub") for name in settings.hub_ids]
    return ListObject[ModelObject].of(listed, False)
