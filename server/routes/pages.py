"""GET /playground, /docs and their static files. They hold nothing of the server, so they need no key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.responses import Response

from ..pages import HEADERS, load_pages

router = APIRouter()


def _serve(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return page


for path, (content, media_type) in load_pages().items():
    router.add_api_route(path, _serve(content, media_type), methods=["GET", "HEAD"], include_in_schema=False)
