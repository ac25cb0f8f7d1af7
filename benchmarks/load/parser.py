"""One HTTP/1.1 response with a stream of server-sent events in its body, from bytes cut anywhere. No sockets here.

Each `data:` line is a payload of its own, as OpenAI-compatible servers send them; comments and other fields are
skipped.
"""

from __future__ import annotations

END_OF_HEAD = b"\r\n\r\n"


class MalformedResponse(ValueError):
    """The bytes are not HTTP/1.1."""


class ResponseParser:
    """feed(bytes) -> payloads. `status` is known after the head; the body of a status other than 200 is in `body`."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.is_complete = False
        self.keeps_alive = True
        self.body = b""
        self._pending = b""  # not yet understood
        self._line = b""  # the line of the body that has not ended
        self._is_chunked = False
        self._length: int | None = None  # bytes of the body still to come; None = until the connection closes

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that these bytes complete. Raises `MalformedResponse`."""
        self._pending = self._pending + data if self._pending else data
        if self.status is None and not self._read_head():
            return []
        body = self._unchunk() if self._is_chunked else self._take()
        if self.status != 200:
            self.body += body
            return []
        return self._payloads(body) if body else []

    def close(self) -> None:
        """The connection has ended. Raises `MalformedResponse` if the response had not."""
        if not self.is_complete and (self.status is None or self._is_chunked or self._length):
            raise MalformedResponse("the connection was closed before the response ended")
        self.is_complete = True

    def _read_head(self) -> bool:
        end = self._pending.find(END_OF_HEAD)
        if end < 0:
            return False
        first, *lines = self._pending[:end].split(b"\r\n")
        self._pending = self._pending[end + len(END_OF_HEAD) :]
        try:
            version, status = first.split(b" ")[:2]
            self.status = int(status)
        except ValueError:
            raise MalformedResponse(f"{first[:60]!r} is no status line") from None
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in (x.partition(b":") for x in lines)}
        self._is_chunked = headers.get(b"transfer-encoding") == b"chunked"
        if b"content-length" in headers and not self._is_chunked:
            self._length = _size(headers[b"content-length"], 10)
        is_bounded = self._is_chunked or self._length is not None
        self.keeps_alive = is_bounded and version == b"HTTP/1.1" and headers.get(b"connection") != b"close"
        return True

    def _take(self) -> bytes:
        """The body's bytes, when they are not chunked."""
        body, self._pending = self._pending, b""
        if self._length is not None:
            body = body[: self._length]
            self._length -= len(body)
            self.is_complete = self._length == 0
        return body

    def _unchunk(self) -> bytes:
        """The contents of the chunks that are whole."""
        pending, at, parts = self._pending, 0, []
        while (end := pending.find(b"\r\n", at)) >= 0:
            size = _size(pending[at:end].partition(b";")[0], 16)
            if size == 0:  # the last chunk; trailers may follow
                self.is_complete = pending.find(END_OF_HEAD, end) >= 0
                break
            start, stop = end + 2, end + 2 + size
            if len(pending) < stop + 2:
                break
            parts.append(pending[start:stop])
            at = stop + 2
        self._pending = pending[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _payloads(self, body: bytes) -> list[bytes]:
        *lines, self._line = (self._line + body).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def _size(text: bytes, base: int) -> int:
    try:
        size = int(text, base)
    except ValueError:
        size = -1
    if size < 0:
        raise MalformedResponse(f"{text[:20]!r} is no size of a body or chunk")
    return size
