"""A client of an ASGI app that is made by hand, so that it can read slowly and leave at any moment."""

from __future__ import annotations

import asyncio
import json

GUARD_SECONDS = 10


class Caller:
    """A hand-made ASGI client that sends one request and leaves when told to."""

    def __init__(self, app, body, *, is_body_cut=False):
        raw = json.dumps(body).encode()
        self.messages = []
        self._inbox = asyncio.Queue()
        self._inbox.put_nowait(
            {"type": "http.request", "body": raw[:5] if is_body_cut else raw, "more_body": is_body_cut}
        )
        self._is_gone = False
        self.reads_until = None  # a slow reader takes so many messages, then none
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message):
        while self.reads_until is not None and len(self.messages) >= self.reads_until:  # noqa: ASYNC110 - set by tests
            await asyncio.sleep(0.002)
        if self._is_gone:
            raise OSError("the socket is closed")
        self.messages.append(message)

    def leave(self, *, breaks_sends=False):
        self._is_gone = breaks_sends
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def ended(self):
        await asyncio.wait_for(self.task, GUARD_SECONDS)
