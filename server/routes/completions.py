"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..answers.completions import CompletionWriter
from ..answers.respond import respond
from ..door.validation import prepare_completion
from ..state import ServerState, refuse_unless_ready
from ..wire.answers import Completion
from ..wire.document import GENERATING, documented
from ..wire.requests import CompletionRequest

router = APIRouter()


@router.post("/v1/completions", **documented(Completion, *GENERATING, body=CompletionRequest, chunk=Completion))
async def create_completion(http: Request) -> Response:
    """Continue one prompt or several, in text or as token ids."""
    refuse_unless_ready(http)
    prepared = await prepare_completion(http)
    return await respond(http, prepared, CompletionWriter(ServerState.of(http), prepared))
