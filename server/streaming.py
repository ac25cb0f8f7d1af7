"""Server-sent events. The socket paces the engine's reader: a slow client stalls only its own request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import aclosing

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, describe, log_failure
from .generation import Event, Events, num_chars, unless_disconnected
from .off_loop import CHARS_PER_SCORE, off_loop

ENCODE = msgspec.json.Encoder().encode
TOKENS_PER_EVENT = 256  # whose log-probabilities one chunk may hold
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# One event -> the chunks that it makes, and the chunks that close a stream.
Render = Callable[[Event], Iterable[msgspec.Struct]]
RenderEnd = Callable[[], Iterable[msgspec.Struct]]


class EventStream(Response):
    """A stream of chunks that begins with `first`, ends with [DONE], and is aborted when the client leaves."""

    media_type = "text/event-stream"
    end = DONE

    def __init__(
        self, first: Event, rest: Events, render: Render, render_end: RenderEnd, headers: dict[str, str]
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(STREAM_HEADERS | headers)
        self._first = first
        self._rest = rest
        self._render = render
        self._render_end = render_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect, OSError):
            await unless_disconnected(receive, self._pump(scope, send))

    async def _pump(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._rest) as rest:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await self._send_event(send, self._first)
                async for event in rest:
                    await self._send_event(send, event)
                tail = self._encode(self._render_end())
            except OSError:
                raise
            except Exception as error:
                tail = self._fail(scope, error)
            await _send_body(send, tail + self.end, more=False)

    async def _send_event(self, send: Send, event: Event) -> None:
        """An event's chunks. Many log-probabilities, as a long prompt has or what has piled up, go a few at a time."""
        job, output = event
        for part in output.cut(TOKENS_PER_EVENT):
            frames = await self._frames_of((job, part))
            if frames:
                await _send_body(send, frames)

    async def _frames_of(self, event: Event) -> bytes:
        return await off_loop(self._num_chars(event), lambda: self._encode(self._render(event)))

    def _num_chars(self, event: Event) -> int:
        """What it costs to write its chunks."""
        return num_chars([event])

    def _fail(self, scope: Scope, error: Exception) -> bytes:
        """The status has been sent, so the error goes the way of the chunks."""
        answer = describe(error)
        log_failure(scope["state"]["request_id"], error, answer)
        scope["app"].state.server.metrics.count_refusal(answer.reason)
        return self._encode_failure(answer)

    def _encode(self, chunks: Iterable[msgspec.Struct]) -> bytes:
        frames = b""
        for chunk in chunks:
            frames += b"data: %b\n\n" % ENCODE(chunk)
        return frames

    def _encode_failure(self, answer: ApiError) -> bytes:
        return b"data: %b\n\n" % answer.envelope()


class NamedEventStream(EventStream):
    """The same with the name of each event, which is its struct's tag, before its data, and without [DONE]."""

    end = b""

    def __init__(
        self,
        first: Event,
        rest: Events,
        render: Render,
        render_failure: Callable[[ApiError], Iterable[msgspec.Struct]],
        headers: dict[str, str],
    ) -> None:
        super().__init__(first, rest, render, tuple, headers)
        self._render_failure = render_failure

    def _num_chars(self, event: Event) -> int:
        """The last event repeats all of the answer."""
        output = event[1]
        num_repeated = 0 if output.finish_reason is None else output.num_output_tokens
        return super()._num_chars(event) + num_repeated * CHARS_PER_SCORE

    def _encode(self, chunks: Iterable[msgspec.Struct]) -> bytes:
        frames = b""
        for chunk in chunks:
            name = str(chunk.__struct_config__.tag).encode()
            frames += b"event: %b\ndata: %b\n\n" % (name, ENCODE(chunk))
        return frames

    def _encode_failure(self, answer: ApiError) -> bytes:
        return self._encode(self._render_failure(answer))


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
