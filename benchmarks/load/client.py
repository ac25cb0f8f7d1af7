"""A client of streams, fast enough that a measurement shows the server: raw asyncio, one connection per request.

The `usage` of a chunk counts its tokens where the server sends it (`continuous_usage_stats`). Else its ids do. Else
a chunk with text counts as one token. All times are of the clock that the processes of one machine share.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .load import ROUTES, Endpoint, Request
from .parser import MalformedResponse, ResponseParser
from .target import Target

IDLE_SECONDS = 2.0  # servers drop an idle connection after 5 or so; a younger one is safe to use again
READ_BYTES = 1 << 16
DONE = b"[DONE]"
CLOSED = "connection closed"
MAX_MESSAGE_CHARS = 400


@dataclass
class Sample:
    """The record of one request. Times are seconds of `time.perf_counter`."""

    index: int
    started: float
    ended: float = 0.0
    lag: float = 0.0  # how late the client sent it
    times: array[float] = field(default_factory=lambda: array("d"))  # of each chunk with tokens
    tokens: array[int] = field(default_factory=lambda: array("l"))  # in each of them
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None  # its kind; None = answered in full
    message: str | None = None  # the server's words for it


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Exchange:
    """One request under way: bytes in, a `Sample` out."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.parser = ResponseParser()
        self.is_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.has_begun = False
        self._has_ended = False
        self._is_done = False  # [DONE] has come

    def feed(self, data: bytes, now: float) -> None:
        self.has_begun = True
        try:
            for payload in self.parser.feed(data):
                if payload == DONE:
                    self._is_done = True
                else:
                    self._take(_decode(payload), now)
        except (MalformedResponse, msgspec.MsgspecError):
            self.end(now, "malformed response")
        if self.parser.is_complete:
            self._finish(now)

    def close(self, now: float) -> None:
        """Take note that the connection has ended."""
        try:
            self.parser.close()
        except MalformedResponse:
            self.end(now, CLOSED)
        self._finish(now)

    def end(self, now: float, error: str | None = None, message: str | None = None) -> None:
        """End the exchange. Later bytes and later errors change nothing."""
        if not self._has_ended:
            self._has_ended, self.sample.ended = True, now
            self.sample.error, self.sample.message = error, message
        if not self.is_over.done():  # a timeout has cancelled it
            self.is_over.set_result(None)

    def _finish(self, now: float) -> None:
        if self.parser.status != 200:
            self.end(now, f"status {self.parser.status}", _message_of(self.parser.body))
        elif not (self._is_done and self.sample.times):
            self.end(now, "stream without [DONE]" if self.sample.times else "no tokens")
        else:
            self.end(now)

    def _take(self, chunk: _Chunk, now: float) -> None:
        if chunk.error is not None:
            self.end(now, "error in the stream", _message_in(chunk.error))
            return
        sample = self.sample
        num_new = sum(map(_num_tokens, chunk.choices))
        if chunk.usage is not None:
            sample.num_prompt_tokens = chunk.usage.prompt_tokens
            if chunk.usage.completion_tokens is not None:
                num_new = chunk.usage.completion_tokens - sample.num_output_tokens
        sample.num_output_tokens += num_new
        if num_new > 0 and chunk.choices:  # a chunk without choices tells the total again
            sample.times.append(now)
            sample.tokens.append(num_new)


def _message_of(body: bytes) -> str | None:
    """The message in the body of an error, in any of the forms that servers use."""
    try:
        return _message_in(msgspec.json.decode(body))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _message_in(body.decode(errors="replace"))


def _message_in(error: Any) -> str | None:
    while isinstance(error, dict):
        error = error.get("error") or error.get("message") or error.get("detail")
    text = " ".join(str(error or "").split())
    return text[:MAX_MESSAGE_CHARS] or None


def _num_tokens(choice: _Choice) -> int:
    if choice.token_ids is not None:
        return len(choice.token_ids)
    delta = choice.delta
    return int(bool(choice.text or (delta and (delta.content or delta.reasoning_content))))


class Connection(asyncio.BufferedProtocol):
    """A connection that carries one exchange after another.

    The connection reads into `buffer`, which all connections of an event loop may share: each read is copied at once. A
    plain protocol gets 256 KiB of fresh memory for every read, which takes longer than everything else here.
    """

    def __init__(self, buffer: memoryview) -> None:
        self.idle_since = 0.0
        self._buffer = buffer
        self.exchange: Exchange | None = None
        self._transport: asyncio.Transport | None = None

    @property
    def is_reusable(self) -> bool:
        young = time.perf_counter() - self.idle_since < IDLE_SECONDS
        return young and self._transport is not None and not self._transport.is_closing()

    def begin(self, exchange: Exchange, wire: bytes) -> None:
        self.exchange = exchange
        if self._transport is None:  # closed as soon as it was made
            exchange.close(time.perf_counter())
        else:
            self._transport.write(wire)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self.exchange is not None:
            self.exchange.feed(bytes(self._buffer[:nbytes]), time.perf_counter())

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self.exchange is not None:
            self.exchange.close(time.perf_counter())


class Client:
    """Sends requests to one server, each over a connection that is idle or new."""

    def __init__(self, target: Target, endpoint: Endpoint, *, ignore_eos: bool, timeout: float) -> None:
        self.target = target
        self.route = ROUTES[endpoint]
        self.wants_exact_length = ignore_eos
        self.timeout = timeout
        self._idle: list[Connection] = []
        self._buffer = memoryview(bytearray(READ_BYTES))

    def write(self, request: Request) -> bytes:
        return self.target.post(self.route, request.body)

    async def send(self, request: Request, wire: bytes, *, lag: float = 0.0) -> Sample:
        """Send the request and return its sample, failed or not. The clock starts before the connection is made."""
        started = time.perf_counter()
        exchange = Exchange(Sample(request.index, started, lag=lag))
        try:
            async with asyncio.timeout(self.timeout):
                connection = self._take_idle()
                if connection is not None and await self._exchange(connection, exchange, wire):
                    # The server had dropped the idle connection; as any HTTP client does, try again on a new one.
                    exchange = Exchange(Sample(request.index, started, lag=lag))
                    connection = None
                if connection is None:
                    await self._exchange(await self._connect(), exchange, wire)
        except TimeoutError:
            exchange.end(time.perf_counter(), "timeout")
        except OSError as error:
            exchange.end(time.perf_counter(), f"connection: {type(error).__name__}")
        sample = exchange.sample
        if sample.error is None and self.wants_exact_length and sample.num_output_tokens != request.max_tokens:
            sample.error = "answer not of max_tokens"
        return sample

    async def _exchange(self, connection: Connection, exchange: Exchange, wire: bytes) -> bool:
        """Run the exchange to its end. True if the connection was closed before its first byte."""
        try:
            connection.begin(exchange, wire)
            await exchange.is_over
        finally:
            self._put_back(connection, exchange)
        return exchange.sample.error == CLOSED and not exchange.has_begun

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    def _take_idle(self) -> Connection | None:
        """The idle connection used last, or None if it is too old: the others are older still."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            connection.close()
        return None

    def _put_back(self, connection: Connection, exchange: Exchange) -> None:
        connection.exchange = None
        connection.idle_since = time.perf_counter()
        parser = exchange.parser
        if parser.is_complete and parser.keeps_alive and connection.is_reusable:
            self._idle.append(connection)
        else:
            connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        tls = True if self.target.is_tls else None
        _, connection = await loop.create_connection(
            lambda: Connection(self._buffer), self.target.host, self.target.port, ssl=tls
        )
        return connection


async def run_closed(client: Client, requests: list[tuple[Request, bytes]], streams: int) -> list[Sample]:
    """Run `streams` streams, each of which sends its next request when its last one has ended."""
    pending: Iterator[tuple[Request, bytes]] = iter(requests)

    async def stream() -> list[Sample]:
        return [await client.send(request, wire) for request, wire in pending]

    return [sample for samples in await asyncio.gather(*(stream() for _ in range(streams))) for sample in samples]


async def run_open(
    client: Client, requests: Iterator[tuple[float, Request, bytes]], start: float, samples: list[Sample]
) -> None:
    """Send each request at its time after `start`, whether or not earlier ones have ended. Fills `samples`."""

    async def one(request: Request, wire: bytes, lag: float) -> None:
        samples.append(await client.send(request, wire, lag=lag))

    async with asyncio.TaskGroup() as tasks:
        for at, request, wire in requests:
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            tasks.create_task(one(request, wire, time.perf_counter() - start - at))
