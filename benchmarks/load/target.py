"""The address of a server, and the bytes of a request to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .errors import BenchUsageError


@dataclass(frozen=True)
class Target:
    """A server's address. `path` stands before /v1."""

    host: str
    port: int
    is_tls: bool
    path: str
    api_key: str | None

    @classmethod
    def parse(cls, url: str, api_key: str | None) -> Target:
        """http://host:port, with or without a path and /v1. Raises `BenchError`."""
        import httpx  # not at the top: workers need no httpx

        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, parts.hostname, parts.port
            httpx.URL(url)  # refuses more than urlsplit
            (host or "").encode("idna")  # the form that the resolver takes
        except (ValueError, httpx.InvalidURL):
            scheme, host, port = "", None, None
        if scheme not in ("http", "https") or not host:
            raise BenchUsageError(f"--url {url} is not an address such as http://127.0.0.1:8000")
        is_tls = scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(host, port or (443 if is_tls else 80), is_tls, path, api_key)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}{self.path}"

    @property
    def is_local(self) -> bool:
        return self.host in ("localhost", "127.0.0.1", "::1")

    @property
    def headers(self) -> dict[bytes, bytes]:
        """The header with the key in UTF-8, since servers compare bytes."""
        if not self.api_key:
            return {}
        return {b"Authorization": b"Bearer " + self.api_key.encode(errors="surrogateescape")}

    def post(self, route: str, body: dict[str, Any]) -> bytes:
        """The whole request, head and JSON body."""
        content = json.dumps(body, separators=(",", ":")).encode()
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = {
            "Host": f"{host}:{self.port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Accept": "text/event-stream",
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items()).encode()
        key = b"".join(b"%b: %b\r\n" % header for header in self.headers.items())
        return f"POST {self.path}{route} HTTP/1.1\r\n".encode() + lines + key + b"\r\n" + content
