"""The answer to a chat or completion request as an HTTP response, whole or streamed."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from ..door.validation import Prepared
from ..off_loop import off_loop
from ..wire.requests import ChatRequest, CompletionRequest
from .chat import ChatWriter
from .completions import CompletionWriter
from .generation import collect, generate, num_chars, traced, unless_disconnected
from .pieces import PiecedResponse
from .streaming import EventStream


async def respond(
    http: Request,
    prepared: Prepared[ChatRequest] | Prepared[CompletionRequest],
    writer: ChatWriter | CompletionWriter,
) -> Response:
    """Generate the choices of `prepared`; `writer` writes the answer.

    Raises the error of a choice that fails before the answer begins; a later error ends the stream.
    """
    state = writer.state
    headers = state.tell_ignored(prepared.ignored)
    events = traced(http, state, prepared, writer.id, generate(state, prepared.choices))
    if prepared.request.stream:
        return EventStream(events, writer.render, writer.render_end, headers)
    outputs = await unless_disconnected(http.receive, collect(events))
    cost = sum(num_chars(output) for _, output in outputs)
    return await off_loop(cost, lambda: PiecedResponse(writer.whole(outputs), headers))
