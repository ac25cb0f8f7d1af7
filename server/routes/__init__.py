"""The routes, and how one that only reads is declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter

H = TypeVar("H", bound=Callable[..., Any])


def reading(router: APIRouter, path: str, **documentation: Any) -> Callable[[H], H]:
    """A route for GET and HEAD, of which the document tells the first. Balancers and clients probe by the second."""

    def add(handler: H) -> H:
        router.add_api_route(path, handler, methods=["GET", "HEAD"], include_in_schema=False)  # asked first
        router.add_api_route(path, handler, methods=["GET"], **documentation)
        return handler

    return add
