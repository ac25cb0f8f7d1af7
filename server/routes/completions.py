"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..answers.completions import CompletionWriter
from ..answers.respond import respond
from ..door.validation import prepare_completion
from ..state import ReadyState
from ..wire.answers import Completion
from ..wire.document import GENERATING, documented
from ..wire.requests import CompletionRequest

router = APIRouter()


@router.post("/v1/completions", **documented(Completion, *GENERATING, body=CompletionRequest, chunk=Completion))
async def create_completion(http: Request, state: ReadyState) -> Response:
    """Continue one prompt or several, in text or as token ids."""
    prepared = await prepare_completion(http, state)
    return await respond(http, prepared, CompletionWriter(state, prepared))
