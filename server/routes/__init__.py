"""The routes. `reading` declares a route that only reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter

H = TypeVar("H", bound=Callable[..., Any])


def reading(router: APIRouter, path: str, **documentation: Any) -> Callable[[H], H]:
    """A route for GET and HEAD; only GET is in the document. Balancers and clients probe by HEAD."""

    def add(handler: H) -> H:
        router.add_api_route(path, handler, methods=["GET", "HEAD"], include_in_schema=False)  # the first match counts
        router.add_api_route(path, handler, methods=["GET"], **documentation)
        return handler

    return add
