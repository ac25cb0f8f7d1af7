"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..errors import UnknownModelError
from ..state import ServerState, State
from ..wire.answers import json_response
from ..wire.document import documented
from ..wire.service import ModelCard, ModelList
from . import reading

router = APIRouter()


@reading(router, "/v1/models", **documented(ModelList))
async def list_models(state: State) -> Response:
    """The one model that is served."""
    return json_response(ModelList("list", [_card(state)]))


# A path: names may look like "organisation/model".
@reading(router, "/v1/models/{model_id:path}", **documented(ModelCard, 404, path="model_id"))
async def retrieve_model(http: Request, state: State) -> Response:
    """The model by its name."""
    model_id = http.path_params["model_id"]
    if not model_id:
        raise HTTPException(404)  # as behind any other route's final slash
    if model_id != state.model_name:
        shown = model_id[:80]
        raise UnknownModelError(f"the model {shown!r} is not served here; this is {state.model_name!r}", "model")
    return json_response(_card(state))


def _card(state: ServerState) -> ModelCard:
    return ModelCard(state.model_name, "model", state.created, "leyden", state.llm.client.info.max_model_len)
