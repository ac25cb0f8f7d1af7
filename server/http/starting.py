"""Answers to everything with 503 while the model is loaded, which tells clients to wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from ..errors import overloaded

HEAD_END = b"\r\n\r\n"
CHUNK_BYTES = 1 << 16


@contextlib.asynccontextmanager
async def refusing(listener: socket.socket, backlog: int, read_timeout: float) -> AsyncIterator[None]:
    """Listen on `listener` and answer each request with 503; a client has `read_timeout` seconds to send it.

    Connections that come after the end wait in the socket's queue, for the server that takes it over.
    """

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        expected = (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)
        with contextlib.suppress(*expected), contextlib.closing(writer):
            async with asyncio.timeout(read_timeout):
                await reader.readuntil(HEAD_END)
                writer.write(_answer())
                writer.write_eof()
                while await reader.read(CHUNK_BYTES):  # an unread body would reset the connection and the answer
                    pass

    server = await asyncio.start_server(refuse, sock=listener.dup(), backlog=backlog)
    try:
        yield
    finally:
        server.close()


def _answer() -> bytes:
    error = overloaded("the server is starting; retry later")
    body = error.envelope()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    lines = [f"{name}: {value}\r\n" for name, value in (fields | error.headers).items()]
    return f"HTTP/1.1 503 Service Unavailable\r\n{''.join(lines)}\r\n".encode() + body
