"""How many chunks a second one worker of `leyden bench http` can take: its own ceiling, not a server's.

python -P benchmarks/client_ceiling.py [--streams 256] [--tokens 400] [--rate 20000]

A trivial server in a process of its own writes a chunk to every stream, round after round, at a fixed pace or (without
--rate) as fast as it can. Chunks per second of the worker's processor time are what the worker could take if it had a
core to itself; the server paces itself by its own clock, so at a pace that is reached both numbers are honest. Unpaced,
several chunks arrive per read, which makes each cheaper. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

from leyden.benchmarks.load.flags import Span
from leyden.benchmarks.load.load import Load, Workload
from leyden.benchmarks.load.target import Target
from leyden.benchmarks.load.workers import Share, Workers

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def chunk(tokens: int) -> bytes:
    """What leyden writes for a token, as an HTTP chunk."""
    body = {
        "id": "cmpl-" + "0" * 32,
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "demo",
        "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}],
        "usage": {"prompt_tokens": 128, "completion_tokens": tokens, "total_tokens": 128 + tokens},
    }
    data = b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class Streams(asyncio.Protocol):
    """Answers whatever is asked, once all streams have asked."""

    waiting: list[asyncio.Transport]

    def __init__(self, waiting: list[asyncio.Transport], arrived: asyncio.Event, expected: int) -> None:
        self.waiting, self.arrived, self.expected = waiting, arrived, expected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.waiting.append(self.transport)
        if len(self.waiting) == self.expected:
            self.arrived.set()


async def serve(pipe: Connection, streams: int, tokens: int, rate: float | None) -> None:
    waiting: list[asyncio.Transport] = []
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Streams(waiting, arrived, streams), "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    chunks = [chunk(1 + i) for i in range(tokens)]
    await arrived.wait()
    start = time.perf_counter()
    for number, data in enumerate(chunks):
        for transport in waiting:
            transport.write(HEAD + data if number == 0 else data)
        due = start + (number + 1) * streams / rate if rate else 0.0
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    for transport in waiting:
        transport.write(END)
    await asyncio.to_thread(pipe.recv)


def run_server(pipe: Connection, streams: int, tokens: int, rate: float | None) -> None:
    asyncio.run(serve(pipe, streams, tokens, rate))


def measure(streams: int, tokens: int, rate: float | None) -> dict[str, float]:
    """One worker, `streams` streams of `tokens` chunks each."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    server = context.Process(target=run_server, args=(theirs, streams, tokens, rate), daemon=True)
    server.start()
    target = Target("127.0.0.1", mine.recv(), False, "", None)
    length = Span(tokens, tokens)
    workload = Workload("completions", "demo", "ids", Span(128, 128), length, 1000, 0.0, True, False, 0)
    workers = Workers(1, has_background=False)
    results, _ = workers.run(Share(target, workload, Load(streams, concurrency=streams), timeout=120.0))
    workers.close()
    mine.send("stop")
    server.join()
    samples = results[0].samples
    if errors := {sample.error for sample in samples} - {None}:
        raise SystemExit(f"the client failed: {errors}")
    chunks = sum(len(sample.times) for sample in samples)
    seconds = max(sample.ended for sample in samples) - min(sample.times[0] for sample in samples)
    busy = results[0].cpu_share * (max(sample.ended for sample in samples) - results[0].start)
    return {
        "streams": streams,
        "chunks_per_s": round(chunks / seconds),
        "chunks_per_processor_s": round(chunks / busy),
        "us_per_chunk": round(1e6 * busy / chunks, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rate", type=float, default=None, help="chunks per second over all streams")
    arguments = parser.parse_args()
    found = measure(arguments.streams, arguments.tokens, arguments.rate)
    print(f"{found['chunks_per_s']} chunks/s, {found['us_per_chunk']} µs of the worker's processor time per chunk")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
