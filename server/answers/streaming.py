"""Server-sent events. The client's socket sets the pace: a slow client stalls only its own request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from functools import partial

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ..errors import ApiError, describe, log_failure
from ..off_loop import CHARS_PER_SCORE, off_loop
from .events import Event, Events
from .generation import cancel_all, num_chars, unless_disconnected

ENCODE = msgspec.json.Encoder().encode
TOKENS_PER_EVENT = 256  # whose log-probabilities one chunk holds at most
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"  # a comment line: clients skip it
LINE_ENDS = {character.encode(): b"\\u%04x" % ord(character) for character in "\u0085\u2028\u2029"}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# An event -> its chunks; and the chunks that close a stream.
Render = Callable[[Event], Iterable[msgspec.Struct]]
RenderEnd = Callable[[], Iterable[msgspec.Struct]]


class EventStream(Response):
    """A stream of chunks that ends with [DONE]. The request is aborted when the client leaves.

    The response starts with the first event, so that an earlier error has its own status, or after `patience` seconds.
    From then on every `ping_seconds` without a chunk bring a comment, because proxies cut silent connections.
    """

    media_type = "text/event-stream"
    end = DONE
    patience = 1.0
    ping_seconds = 15.0

    def __init__(self, events: Events, render: Render, render_end: RenderEnd, headers: dict[str, str]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(STREAM_HEADERS | headers)
        self._events = events
        self._render = render
        self._render_end = render_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        line = _Line(send, start)
        try:
            await unless_disconnected(receive, self._pump(line, scope))
        except (ClientDisconnect, OSError):
            if not line.is_open:
                raise

    async def _pump(self, line: _Line, scope: Scope) -> None:
        async with aclosing(self._events) as events, self._pinging(line):
            try:
                async for event in events:
                    await self._send_event(line, event)
                tail = self._encode(self._render_end())
            except OSError:
                raise
            except Exception as error:
                if not line.is_open:
                    raise
                tail = self._fail(scope, error)
            await line.write(tail + self.end, more=False)

    @contextlib.asynccontextmanager
    async def _pinging(self, line: _Line) -> AsyncIterator[None]:
        pinging = asyncio.create_task(line.ping(self.patience, self.ping_seconds))
        try:
            yield
        finally:
            await cancel_all(pinging)

    async def _send_event(self, line: _Line, event: Event) -> None:
        """Send an event's chunks. An output of many tokens, of a long prompt or piled up, is cut into small ones."""
        choice, output = event
        for part in output.cut(TOKENS_PER_EVENT):
            frames = await off_loop(self._num_chars((choice, part)), partial(self._frames, (choice, part)))
            if frames or not line.is_open:
                await line.write(frames)

    def _frames(self, event: Event) -> bytes:
        return self._encode(self._render(event))

    def _num_chars(self, event: Event) -> int:
        """The cost of writing the event's chunks, in the unit of `off_loop`."""
        return num_chars(event[1])

    def _fail(self, scope: Scope, error: Exception) -> bytes:
        """The error as the last chunk: the status has been sent already."""
        answer = describe(error)
        log_failure(scope, error, answer)
        scope["app"].state.server.metrics.count_refusal(answer.reason)
        return self._encode_failure(answer)

    def _encode(self, chunks: Iterable[msgspec.Struct]) -> bytes:
        frames = b""
        for chunk in chunks:
            frames += _data(ENCODE(chunk))
        return frames

    def _encode_failure(self, answer: ApiError) -> bytes:
        return _data(answer.envelope())


class NamedEventStream(EventStream):
    """A stream whose events have names: the tag of each chunk's struct. It ends without [DONE]."""

    end = b""

    def __init__(
        self,
        events: Events,
        render: Render,
        render_failure: Callable[[ApiError], Iterable[msgspec.Struct]],
        headers: dict[str, str],
    ) -> None:
        super().__init__(events, render, tuple, headers)
        self._render_failure = render_failure

    def _num_chars(self, event: Event) -> int:
        """The last event repeats the whole answer."""
        output = event[1]
        num_repeated = 0 if output.finish_reason is None else output.num_output_tokens
        return super()._num_chars(event) + num_repeated * CHARS_PER_SCORE

    def _encode(self, chunks: Iterable[msgspec.Struct]) -> bytes:
        frames = b""
        for chunk in chunks:
            name = str(chunk.__struct_config__.tag).encode()
            frames += b"event: %b\n%b" % (name, _data(ENCODE(chunk)))
        return frames

    def _encode_failure(self, answer: ApiError) -> bytes:
        return self._encode(self._render_failure(answer))


class _Line:
    """The connection to one client. Headers go before the first bytes; comments go while there are no chunks."""

    def __init__(self, send: Send, start: Message) -> None:
        self.is_open = False
        self._send = send
        self._start = start
        self._lock = asyncio.Lock()
        self._clock = asyncio.get_running_loop().time
        self._last_write = self._clock()

    async def write(self, body: bytes, *, more: bool = True) -> None:
        async with self._lock:
            if not self.is_open:
                await self._send(self._start)
                self.is_open = True
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._last_write = self._clock()

    async def ping(self, patience: float, interval: float) -> None:
        """Open the line after `patience` seconds if nothing has been written, then write after every `interval`."""
        await asyncio.sleep(patience)
        if not self.is_open:
            await self.write(PING)
        while True:
            await asyncio.sleep(self._last_write + interval - self._clock())
            if self._clock() - self._last_write >= interval:
                await self.write(PING)


def _data(json: bytes) -> bytes:
    """A frame of the stream. JSON leaves LINE_ENDS as they are, and readers in many languages end a line there."""
    if b"\xe2\x80" in json or b"\xc2\x85" in json:
        for character, escape in LINE_ENDS.items():
            json = json.replace(character, escape)
    return b"data: %b\n\n" % json
