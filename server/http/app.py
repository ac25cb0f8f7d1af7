"""The HTTP application over an engine that its caller starts and stops."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ... import __version__
from ...configs.schema import ServerConfig
from ...engine.async_llm import AsyncLLM
from ...engine.text.grammar import GrammarCompiler
from ..errors import ApiError, describe, unknown_route
from ..metrics import ServerMetrics
from ..parsers.formats import ChatFormat
from ..responses_api import route as responses
from ..routes import chat, completions, health, models, pages, sessions, status, tokenize
from ..state import ServerState, max_body_bytes
from ..wire.token_names import TokenNames
from .middleware import (
    AccessLogMiddleware,
    AuthMiddleware,
    ConnectionLimitMiddleware,
    ErrorMiddleware,
    RequestIdMiddleware,
    SizeLimitMiddleware,
    load_keys,
)
from .origins import CorsMiddleware, HostMiddleware, OriginMiddleware

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

MODULES = (completions, chat, responses, sessions, models, tokenize, health, status, pages)
PATHS = frozenset(route.path for module in MODULES for route in module.router.routes if isinstance(route, Route))


def create_app(
    llm: AsyncLLM,
    settings: ServerConfig,
    *,
    model_name: str,
    tracer: Tracer | None = None,
    grammars: GrammarCompiler | None = None,
) -> FastAPI:
    """Routes and middleware around `llm`, whose client has started. With a `tracer` every generation makes a span.
    `grammars`: a compiler whose tokenizer is already loading; None makes one on first use.

    `app.state.draining` may be set to True at any time: from then on new work and /health get 503. Raises `ConfigError`
    when the API keys cannot be read, or when `tool_call_parser` does not fit the chat template.
    """
    metrics = ServerMetrics(llm.client, settings.metrics_prefix, model_name)
    app = FastAPI(
        title="Leyden",
        version=__version__,
        docs_url=None,  # FastAPI's page loads scripts from a CDN; `routes.pages` has one that does not
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(settings, metrics, tracer, max_body_bytes(settings, llm.client.info)),
        exception_handlers={HTTPException: _pass_on, RequestValidationError: _pass_on},
    )
    app.state.draining = False
    app.state.server = ServerState(
        llm,
        settings,
        model_name,
        metrics,
        created=int(time.time()),
        token_names=TokenNames(llm.tokenizer),
        chat_format=ChatFormat.choose(settings, llm.tokenizer),
        grammars=grammars or GrammarCompiler(llm.tokenizer.for_grammars),
    )
    for module in MODULES:
        app.include_router(module.router)
    return app


def _middleware(
    settings: ServerConfig, metrics: ServerMetrics, tracer: Tracer | None, max_body_bytes: int
) -> list[Middleware]:
    """The layers around the routes, outermost first."""
    keys = load_keys(settings)
    return [
        Middleware(RequestIdMiddleware),
        *([Middleware(AccessLogMiddleware)] if settings.access_log else []),
        *_cors(settings),
        *_tracing(tracer),
        Middleware(ErrorMiddleware, metrics=metrics),
        *_browser_guards(settings, keys),
        Middleware(ConnectionLimitMiddleware, bound=settings.max_connections),
        Middleware(AuthMiddleware, keys=keys),
        Middleware(SizeLimitMiddleware, settings=settings, max_body_bytes=max_body_bytes),
    ]


def _tracing(tracer: Tracer | None) -> list[Middleware]:
    if tracer is None:
        return []
    from .tracing import TracingMiddleware

    return [Middleware(TracingMiddleware, tracer=tracer)]


def _cors(settings: ServerConfig) -> list[Middleware]:
    return [Middleware(CorsMiddleware, origins=settings.cors_origins)] if settings.cors_origins else []


def _browser_guards(settings: ServerConfig, keys: list[str]) -> list[Middleware]:
    """The guards against foreign pages; none with keys, because a browser sends no key for a foreign page."""
    if keys:
        return []
    return [Middleware(HostMiddleware, settings=settings), Middleware(OriginMiddleware, settings=settings)]


async def _pass_on(http: Request, error: Exception) -> Response:
    """Hand errors that FastAPI would answer in its own shape on to `ErrorMiddleware`, which answers in OpenAI's."""
    if isinstance(error, RequestValidationError):
        raise ApiError(400, "the request's path or query is malformed") from error
    if isinstance(error, HTTPException) and error.status_code == 404:
        raise unknown_route(http.url.path, PATHS)
    raise describe(error)
