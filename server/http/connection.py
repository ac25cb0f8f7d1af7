"""A client's connection: uvicorn's HTTP/1.1 with h11, with bounds on bytes, on time and on the number of connections.

uvicorn alone waits for ever for a head that does not end and for a client that does not read, and answers bytes that
are no HTTP in plain text. `middleware` bounds bodies.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...configs.schema import ServerConfig
from ..errors import ApiError

logger = logging.getLogger("leyden.server")

SOCKETS_PER_REQUEST = 2  # a second one may be kept alive, or be refused and not closed yet
GRACE_SECONDS = 1.0  # a socket beyond the bound has so long to send; an idle one is kept so long
FLUSH_SECONDS = 2  # streams have so long to send the engine's last message


def uvicorn_config(app: ASGIApp, settings: ServerConfig, **others: Any) -> uvicorn.Config:
    """uvicorn's configuration for `app`, in tests too. `others` are further arguments of `uvicorn.Config`."""
    return uvicorn.Config(
        app,
        http=partial(Connection, settings),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=settings.idle_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=FLUSH_SECONDS,
        **others,
    )


def max_sockets(settings: ServerConfig) -> int:
    """Bound on client connections at once."""
    return SOCKETS_PER_REQUEST * settings.max_connections


class Connection(H11Protocol):
    """One socket, over which requests come one after the other."""

    def __init__(self, settings: ServerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._deadline: asyncio.TimerHandle | None = None  # for a head, or for the rest of an answer
        self._is_reading_head = False
        self._unread: asyncio.TimerHandle | None = None  # runs while the client leaves too much of an answer unread
        self.idle_since = self.loop.time()

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) <= max_sockets(self._settings):
            self._await_head(self._settings.read_timeout)
        else:  # a request that comes at once gets 503; the longest idle connection makes room
            self._await_head(GRACE_SECONDS)
            self._evict_longest_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and not self._is_reading_head:
            self._await_head(self._settings.read_timeout)
        super().data_received(data)
        if self._is_reading_head and self.conn.their_state is not h11.IDLE:  # a request has begun
            self._set_deadline(None)

    def on_response_complete(self) -> None:
        """Bound the time for the unread rest of the answer, and for a body that no handler reads."""
        self.idle_since = self.loop.time()
        self._set_deadline(self._settings.idle_timeout + self._settings.write_timeout, self.transport.abort)
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._unread = self.loop.call_later(self._settings.write_timeout, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP in the envelope, unless another answer has begun."""
        error = sys.exc_info()[1]  # h11's error, which uvicorn does not pass
        if getattr(error, "error_status_hint", 400) == 431:
            self._refuse(too_large_head(self._settings.max_header_bytes))
        else:
            self._refuse(ApiError(400, "this is not a valid HTTP/1.1 request"))

    def _await_head(self, seconds: float) -> None:
        self._set_deadline(seconds, self._refuse_slow_head)
        self._is_reading_head = True

    def _set_deadline(self, seconds: float | None, act: Callable[[], None] | None = None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._is_reading_head = False
        self._deadline = None
        if seconds is not None and act is not None:
            self._deadline = self.loop.call_later(seconds, act)

    def _refuse_slow_head(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(slow_request("the request's headers did not arrive in time"))
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer without a request, and hang up."""
        logger.debug("refused before there was a request: %d %s", error.status, error.reason)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error.envelope()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self._set_deadline(self._settings.write_timeout, self.transport.abort)
        self.transport.close()

    def _evict_longest_idle(self) -> None:
        """Close the connection that has been idle longest, if it has been idle for GRACE_SECONDS."""
        since = self.loop.time() - GRACE_SECONDS
        idle = [
            each
            for each in self.connections
            if isinstance(each, Connection)
            and each.is_idle
            and each.idle_since < since
            and not each.transport.is_closing()
        ]
        if idle:
            min(idle, key=lambda each: each.idle_since).transport.abort()


def too_large_head(bound: int) -> ApiError:
    message = f"request line and headers must have at most {bound} bytes (setting max_header_bytes)"
    return ApiError(431, message, code="headers_too_large")


def slow_request(message: str) -> ApiError:
    return ApiError(408, f"{message} (setting read_timeout)", code="request_timeout", headers={"Connection": "close"})
