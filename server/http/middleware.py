"""Pure ASGI layers around the routes, outermost first: request id, access log, errors, open requests, keys, sizes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...configs.schema import ServerConfig
from ...engine import logs
from ...engine.errors import ConfigError
from ..errors import MAX_PATH_CHARS, ApiError, describe, error_response, log_failure, overloaded
from ..metrics import ServerMetrics
from ..pages import FILES, ROOT_PATH
from .connection import slow_request, too_large_head
from .origins import SAFE_METHODS

logger = logging.getLogger("leyden.server")

HEALTH_PATH = "/health"
# The pages are the same bytes for everyone, and a browser has no key before the page has asked for it.
PUBLIC_PATHS = frozenset({HEALTH_PATH, ROOT_PATH, *FILES})
MAX_REQUEST_ID_CHARS = 128
UNSAFE_ID_CHARS = re.compile(r"[^A-Za-z0-9._:/+=-]")


class RequestIdMiddleware:
    """Echo the caller's x-request-id without unsafe characters, or make one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = UNSAFE_ID_CHARS.sub("", given)[:MAX_REQUEST_ID_CHARS] or uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        scope.setdefault("state", {})["request_id"] = request_id
        logs.request_id.set(request_id)
        await self.app(scope, receive, send_with_id)


class AccessLogMiddleware:
    """One line per request when it is over: client, method, path without its query, status, seconds."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status: int | str = "left"  # the client left before there was a status

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.perf_counter()
        try:
            await self.app(scope, receive, note_status)
        finally:
            client, path = (scope["client"] or ["-"])[0], scope["path"][:MAX_PATH_CHARS]
            logger.info("%s %s %s %s %.3f s", client, scope["method"], path, status, time.perf_counter() - began)


class ErrorMiddleware:
    """Answer every exception in OpenAI's envelope, count it, and log those that are the server's fault."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_started = False

        async def watch_start(message: Message) -> None:
            nonlocal has_started
            has_started = has_started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch_start)
        except ClientDisconnect:
            logger.debug("the client left")
        except asyncio.CancelledError:  # uvicorn stops, and cancels requests of clients that neither send nor read
            if not has_started:
                await error_response(overloaded("the server stopped before it could answer"))(scope, receive, send)
        except Exception as error:
            if has_started:
                raise
            answer = describe(error)
            log_failure(scope, error, answer)
            self.metrics.count_refusal(answer.reason)
            await error_response(answer)(scope, receive, send)


class ConnectionLimitMiddleware:
    """At most `bound` open requests; more get 503.

    GET, HEAD and OPTIONS are not counted: they are answered at once, and a full server must be observable.
    """

    def __init__(self, app: ASGIApp, bound: int) -> None:
        self.app = app
        self.bound = bound
        self.num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            await self.app(scope, receive, send)
            return
        if self.num_open >= self.bound:
            raise overloaded(f"max_connections ({self.bound}) requests are open; retry later")
        self.num_open += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.num_open -= 1


class AuthMiddleware:
    """Deny by default: without a known bearer key only `PUBLIC_PATHS` are answered.

    They are compared with `scope["path"]`, the very string that the router matches: no other spelling of a path can
    pass here and still reach a handler. Keys are kept and compared as digests, all of them every time.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self.digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        is_open = not self.digests or scope["type"] == "lifespan" or scope["path"] in PUBLIC_PATHS
        if not is_open and not self._has_key(scope):
            message = "a valid API key is required: send the header 'Authorization: Bearer <key>'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await self.app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(sent) != 1:
            return False
        scheme, _, key = sent[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self.digests]  # all of them: no early exit
        return any(matches)


class SizeLimitMiddleware:
    """Refuse headers over `max_header_bytes` with 431, a body over `max_body_bytes` with 413, and a body that is not
    complete within `read_timeout` with 408. A declared length is refused at once, others when the bytes exceed it."""

    def __init__(self, app: ASGIApp, settings: ServerConfig, max_body_bytes: int) -> None:
        self.app = app
        self.max_header_bytes = settings.max_header_bytes
        self.bound = max_body_bytes
        self.read_timeout = settings.read_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        num_header_bytes = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if num_header_bytes + sum(len(name) + len(value) for name, value in scope["headers"]) > self.max_header_bytes:
            raise too_large_head(self.max_header_bytes)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.bound:
            raise self._too_large()
        num_received = 0
        deadline: float | None = asyncio.get_running_loop().time() + self.read_timeout

        async def receive_bounded() -> Message:
            nonlocal num_received, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise slow_request(f"the body did not arrive within {self.read_timeout:g} seconds") from None
            if not message.get("more_body", False):
                deadline = None  # the next message is the disconnect, which has no deadline
            num_received += len(message.get("body", b""))
            if num_received > self.bound:
                raise self._too_large()
            return message

        await self.app(scope, receive_bounded, send)

    def _too_large(self) -> ApiError:
        message = f"the request body must have at most {self.bound} bytes (setting max_body_bytes)"
        return ApiError(413, message, code="request_too_large")


def load_keys(settings: ServerConfig) -> list[str]:
    """The keys of the settings and of the key file. Raises `ConfigError`, also for a file without keys."""
    keys = list(settings.api_key)
    if settings.api_key_file is not None:
        keys += _read_keys(settings)
    if any(not key.strip() for key in keys):
        raise ConfigError("api_key must not be empty: set a key, or leave the setting out to serve everyone")
    if any(len(key.split()) > 1 for key in keys):
        raise ConfigError("api_key must hold no blank: a key file has keys alone, one per line, and no remarks")
    return [key.strip() for key in keys]


def _read_keys(settings: ServerConfig) -> list[str]:
    path = settings.api_key_file
    assert path is not None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read api_key_file {path}: {error}") from None
    keys = [line for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"api_key_file {path} has no key: write one key per line")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
