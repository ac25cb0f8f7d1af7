"""Refuse requests under foreign names of this server, and writes by foreign web pages.

Without a key, any page that a user of this machine opens could use the server through the user's browser: by a write
whose answer the page cannot read, or under a name of the page's own that points to this machine (DNS rebinding). A page
can forge neither Host nor Origin nor Sec-Fetch-Site. Other programs can, so this is no authentication.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ...configs.schema import ServerConfig
from ...engine.logs import printable
from ..errors import ApiError, error_response
from ..wire.ignored import IGNORED_HEADER

ANY = "*"
LOCAL_NAMES = frozenset({"localhost", "host.docker.internal", "host.containers.internal"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})  # methods that change nothing
CORS_METHODS = ("GET", "HEAD", "POST", "DELETE")
EXPOSED_HEADERS = ("x-request-id", IGNORED_HEADER, "retry-after")
MAX_ORIGIN_CHARS = 100  # of a name or an origin in an error message


class HostMiddleware:
    """Bound to loopback, answer only requests under local names and `allowed_hosts`."""

    def __init__(self, app: ASGIApp, settings: ServerConfig) -> None:
        self.app = app
        self.names = frozenset({*settings.allowed_hosts, settings.host.lower()})
        self.is_open = ANY in self.names or not _is_local(settings.host.lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.is_open:
            name = _name_of(Headers(scope=scope).get("host", "localhost"))  # a browser always sends it
            if name not in self.names and not _is_local(name):
                raise ApiError(
                    403,
                    f"this server answers local names alone, not {_printable(name)}: add the name to the setting "
                    "allowed_hosts, or set api_key",
                    code="host_not_allowed",
                )
        await self.app(scope, receive, send)


class OriginMiddleware:
    """Refuse writes that a browser sends for a page of another origin, unless `cors_origins` names it.

    The rules are those of Go's `http.CrossOriginProtection`: by Sec-Fetch-Site where there is one, else by Origin and
    Host.
    """

    def __init__(self, app: ASGIApp, settings: ServerConfig) -> None:
        self.app = app
        self.origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            headers = Headers(scope=scope)
            if self._is_foreign(headers):
                page = _printable(headers.get("origin", "another site"))
                raise ApiError(
                    403,
                    f"a page of {page} may not use this server: add its origin to the setting cors_origins, or set "
                    "api_key",
                    code="origin_not_allowed",
                )
        await self.app(scope, receive, send)

    def _is_foreign(self, headers: Headers) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if ANY in self.origins or origin in self.origins:
            return False
        if site is not None:
            return site not in ("same-origin", "none")
        return origin is not None and origin.partition("://")[2] != headers.get("host", "").lower()


class CorsMiddleware(CORSMiddleware):
    """Tell browsers that pages of `origins` may read answers, errors included. A preflight needs no key."""

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        super().__init__(
            app,
            allow_origins=list(origins),
            allow_methods=CORS_METHODS,
            allow_headers=[ANY],
            expose_headers=EXPOSED_HEADERS,
            allow_private_network=True,  # browsers ask for it when a public page calls a server on this machine
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        method, origin = request_headers["access-control-request-method"], request_headers["origin"]
        if self.is_allowed_origin(origin):
            message = f"pages of other origins may send {', '.join(CORS_METHODS)}, not {_printable(method)}"
        else:
            message = f"cross-origin {_printable(f'{method} from {origin}')} is not allowed (setting cors_origins)"
        refusal = error_response(ApiError(403, message, code="origin_not_allowed"))
        refusal.headers["Vary"] = answer.headers.get("vary", "Origin")
        return refusal


def _name_of(host: str) -> str:
    """The host name in a Host header, in lower case, without its port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def _is_local(name: str) -> bool:
    """Whether `name` always means the local machine: no foreign DNS server can answer for it."""
    if name in LOCAL_NAMES or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _printable(text: str) -> str:
    return printable(text[:MAX_ORIGIN_CHARS])
