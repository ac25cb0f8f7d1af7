"""A client that costs little: raw sockets that count the frames of streamed answers, for `api_process.py`.

It imports nothing heavy, so that it starts at once, and ends with code 1 when a stream did not get all of its tokens.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from typing import Any


class StreamReader(asyncio.Protocol):
    """Sends one request and counts the frames of its answer."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.done = asyncio.get_running_loop().create_future()
        self.chunks = 0
        self.started = time.perf_counter()
        self.ttft_s = 0.0

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.chunks and b"data: " in data:
            self.ttft_s = time.perf_counter() - self.started
        self.chunks += data.count(b"data: {")  # a frame is sent whole, and far smaller than a segment of loopback
        self._tail = (self._tail + data)[-1000:]

    def connection_lost(self, error: Exception | None) -> None:
        self.done.set_result(self._tail)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int, help="of a server on this machine")
    parser.add_argument("streams", type=int, help="at once")
    parser.add_argument("rounds", type=int, help="of so many streams, one after the other")
    parser.add_argument("max_tokens", type=int, help="that each answer must have")
    parser.add_argument("route", choices=("completions", "chat/completions"))
    return parser.parse_args()


async def main(port: int, streams: int, rounds: int, max_tokens: int, route: str) -> None:
    body: dict[str, Any] = {"stream": True, "max_tokens": max_tokens, "stream_options": {"include_usage": True}}
    said = "Tell me of a river"
    body |= {"messages": [{"role": "user", "content": said}]} if "chat" in route else {"prompt": said}
    raw = json.dumps(body | {"ignore_eos": True}).encode()
    head = f"POST /v1/{route} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
    readers: list[StreamReader] = []

    async def stream() -> None:
        for _ in range(rounds):
            reader = StreamReader(request)
            await asyncio.get_running_loop().create_connection(lambda reader=reader: reader, "127.0.0.1", port)
            tail = await reader.done
            told = re.search(rb'"completion_tokens":(\d+)', tail)
            if told is None or int(told[1]) != max_tokens or b"data: [DONE]\n\n" not in tail:
                raise SystemExit(f"a stream ended with {tail!r}")
            readers.append(reader)

    started = time.perf_counter()
    await asyncio.gather(*[stream() for _ in range(streams)])
    seconds = time.perf_counter() - started
    first = sorted(reader.ttft_s for reader in readers)
    chunks = sum(reader.chunks - 1 for reader in readers)  # without the one of usage
    told = {"streams": len(readers), "chunks": chunks, "seconds": seconds, "ttft_s": first[len(first) // 2]}
    print(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(main(**vars(parse_arguments())))
