"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..answers.chat import ChatWriter
from ..answers.respond import respond
from ..door.validation import prepare_chat
from ..state import ReadyState
from ..wire.answers import ChatChunk, ChatCompletion
from ..wire.document import GENERATING, documented
from ..wire.requests import ChatRequest

router = APIRouter()


@router.post("/v1/chat/completions", **documented(ChatCompletion, *GENERATING, body=ChatRequest, chunk=ChatChunk))
async def create_chat_completion(http: Request, state: ReadyState) -> Response:
    """Answer a conversation, laid out by the checkpoint's own chat template."""
    prepared = await prepare_chat(http, state)
    return await respond(http, prepared, ChatWriter(state, prepared))
