"""GET /health, /version and /metrics: what balancers, dashboards and people ask."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from ... import __version__
from ..state import ReadyState, State
from ..wire.answers import json_response
from ..wire.document import documented
from ..wire.service import Health, Version
from . import reading

router = APIRouter()


@reading(router, "/health", **documented(Health))
async def health(state: ReadyState) -> Response:
    """200 while the engine answers; 503 when it is dead or the server is draining."""
    return json_response(Health("ok"))


@reading(router, "/version", **documented(Version))
async def version() -> Response:
    return json_response(Version(__version__))


@reading(router, "/metrics", **documented(None))
async def metrics(state: State) -> Response:
    """Prometheus text."""
    return Response(state.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
