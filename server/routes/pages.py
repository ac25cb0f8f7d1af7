"""GET /playground, /docs, their static files, and / which leads to them. They tell nothing of the server, and so need
no key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..pages import HEADERS, ROOT_PATH, load_pages

router = APIRouter()


@router.api_route(ROOT_PATH, methods=["GET", "HEAD"], include_in_schema=False)
async def root(http: Request) -> Response:
    """A browser goes on to the playground; for programs there is nothing here, as under any other unknown path."""
    if "text/html" not in http.headers.get("accept", ""):
        raise HTTPException(404)
    # relative, for a server that a proxy shows under a path of its own
    return RedirectResponse("playground", 307, {"Vary": "Accept", "Cache-Control": HEADERS["Cache-Control"]})


def _serve(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return page


for path, (content, media_type) in load_pages().items():
    router.add_api_route(path, _serve(content, media_type), methods=["GET", "HEAD"], include_in_schema=False)
