"""Answers of many megabytes, encoded and sent in small pieces.

One call that encodes a whole answer would hold Python's lock all the while, and one that sends it the event loop.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

ENCODE = msgspec.json.Encoder().encode
MAX_BYTES_SENT = 65_536  # per message: smaller pieces are joined


class Splicer:
    """Encodes an answer around parts that are encoded already.

    In the answer each of these parts has a stand-in of its own type, which holds a text that no client can guess.
    """

    def __init__(self) -> None:
        self.secret = uuid.uuid4().hex
        self._parts: list[tuple[bytes, list[bytes]]] = []

    def add(self, stand_in: msgspec.Struct, pieces: list[bytes]) -> None:
        """`pieces` replace `stand_in`, which holds `secret`. Stand-ins are added in the order of the answer."""
        self._parts.append((ENCODE(stand_in), pieces))

    def encode(self, answer: msgspec.Struct) -> list[bytes]:
        encoded: list[bytes] = []
        rest = ENCODE(answer)
        for stand_in, pieces in self._parts:
            before, _, rest = rest.partition(stand_in)
            encoded += [before, *pieces]
        return [*encoded, rest]


def joined_entries(lists: Iterable[list[Any]]) -> list[bytes]:
    """The JSON of one list with the entries of all `lists`, without its brackets."""
    encoded = [ENCODE(each)[1:-1] for each in lists if each]
    return [piece if i == 0 else b"," + piece for i, piece in enumerate(encoded)]


def joined(parts: Iterable[msgspec.Struct]) -> list[bytes]:
    """The JSON of one struct whose lists are the concatenated lists of `parts`.

    The parts have the same type, and none of their lists is empty.
    """
    columns: dict[str, list[bytes]] = {}
    for part in parts:
        for name in part.__struct_fields__:
            column = columns.setdefault(name, [])
            column += [b"," * bool(column), ENCODE(getattr(part, name))[1:-1]]
    pieces: list[bytes] = []
    for name, column in columns.items():
        pieces += [b'%b"%b":[' % (b"]," if pieces else b"{", name.encode()), *column]
    return [*pieces, b"]}"]


class PiecedResponse(Response):
    """JSON that is sent piece by piece, no faster than the client reads."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes], headers: dict[str, str] | None = None) -> None:
        self.status_code = 200
        self.background = None
        self._pieces = pieces
        self.init_headers({"content-length": str(sum(map(len, pieces)))} | (headers or {}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        buffer = bytearray()
        for piece in self._pieces:
            buffer += piece
            if len(buffer) >= MAX_BYTES_SENT:
                await send({"type": "http.response.body", "body": bytes(buffer), "more_body": True})
                buffer.clear()
                await asyncio.sleep(0)  # `send` to a quick client never waits, and would keep the event loop
        await send({"type": "http.response.body", "body": bytes(buffer)})
