"""POST /v1/responses."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..answers.generation import generate, traced, unless_disconnected
from ..answers.streaming import NamedEventStream
from ..off_loop import off_loop
from ..state import ReadyState
from ..wire.answers import json_response
from ..wire.document import GENERATING, documented
from .request import ResponsesRequest, prepare_response
from .wire import ResponseObject, StreamEvent
from .writer import ResponseWriter

router = APIRouter()


@router.post(
    "/v1/responses",
    **documented(ResponseObject, *GENERATING, body=ResponsesRequest, named_events=StreamEvent),
)
async def create_response(http: Request, state: ReadyState) -> Response:
    """Answer a conversation in OpenAI's newer shape. Nothing is stored: the client sends the conversation each time."""
    prepared = await prepare_response(http, state)
    request, chat = prepared.request, prepared.chat
    writer = ResponseWriter(state, request, chat)
    headers = state.tell_ignored(chat.ignored)
    events = traced(http, state, chat, writer.id, generate(state, chat.choices))
    if not request.stream:
        whole = await unless_disconnected(http.receive, writer.whole(events))
        return await off_loop(writer.num_chars, lambda: json_response(whole, headers))
    return NamedEventStream(events, writer.render, writer.render_failure, headers)
