"""What a token costs the API process: the real app, tokenizer and ZeroMQ link between a scripted engine and raw sockets.

    python -P benchmarks/api_process.py                               256 streams, a step of 19 ms, 128 tokens each
    python -P benchmarks/api_process.py --step-ms 0                   an engine that is faster than HTTP can be

This process is the API process; the engine, which speaks `engine/messages.py` and computes nothing, and the client,
which only counts frames, are processes of their own. With a step time the engine keeps its pace and µs per token is the
measure: at 60 µs one core carries 16,600 tokens/s. Without, tokens pile up and leave as fewer chunks; every stream must
still be told exactly --max-tokens. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

from leyden.configs.schema import Settings
from leyden.engine.async_llm import AsyncLLM
from leyden.engine.client import ProcessClient
from leyden.engine.loop import run_loop
from leyden.engine.messages import AddRequest, EngineInfo, EngineStats
from leyden.engine.outputs import StepOutput
from leyden.engine.process import Link
from leyden.engine.tokenizer import Tokenizer
from leyden.models.checkpoint import resolve
from leyden.server.app import create_app
from leyden.server.serve import Service, bind

TEXT = "Once upon a time there was a river that ran from the mountains to the sea, past mills and inns. " * 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256, help="concurrent streams")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream, one after the other")
    parser.add_argument("--max-tokens", type=int, default=128, help="length of each answer")
    parser.add_argument("--step-ms", type=float, default=19.0, help="time of an engine step; 0 = as fast as it can")
    parser.add_argument("--route", choices=("completions", "chat/completions"), default="completions", help="API route")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here too")
    arguments = parser.parse_args()
    report = asyncio.run(measure(arguments))
    print(f"{report['streams']} streams on {report['hardware']}: {report['tokens_per_s']} tokens/s in "
          f"{report['chunks_per_s']} chunks/s, {report['cpu_us_per_token']} µs of the API process per token, "
          f"{report['cpu_us_per_chunk']} per chunk; first token {report['ttft_ms']} ms (median)")  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One round of warm-up, then the measured ones."""
    settings = Settings(model="demo", max_num_seqs=arguments.streams, port=0, stats_interval=0, log_level="warning")
    ScriptedClient.ENGINE = ("-P", __file__, "engine", str(arguments.step_ms))
    client = ScriptedClient(settings.engine())
    listener = bind(settings.host, settings.port)
    try:
        await client.start()
        app = create_app(AsyncLLM(client, Tokenizer(resolve("demo", None))), settings, model_name="demo")
        service = Service(settings, client, app)
        serving = asyncio.create_task(service.run(listener))
        await drive(listener.getsockname()[1], arguments, rounds=1)
        report = await timed(listener.getsockname()[1], arguments, client)
        service.server.should_exit = True
        await serving
    finally:
        await client.close()
        listener.close()
    return report


async def timed(port: int, arguments: argparse.Namespace, client: ProcessClient) -> dict[str, Any]:
    before, cpu = client.stats, time.process_time()
    counts = await drive(port, arguments, rounds=arguments.rounds)
    seconds, cpu = counts["seconds"], time.process_time() - cpu
    steps = client.stats.steps_total - before.steps_total
    sending = client.stats.host_seconds_total - before.host_seconds_total
    tokens = counts["streams"] * arguments.max_tokens
    return {
        "hardware": hardware(),
        "streams": arguments.streams,
        "max_tokens": arguments.max_tokens,
        "step_ms": arguments.step_ms,
        "route": arguments.route,
        "streams_per_s": round(counts["streams"] / seconds, 1),
        "tokens_per_s": round(tokens / seconds),
        "chunks_per_s": round(counts["chunks"] / seconds),
        "cpu_us_per_token": round(cpu / tokens * 1e6, 1),
        "cpu_us_per_chunk": round(cpu / counts["chunks"] * 1e6, 1),
        "cpu_share": round(cpu / seconds, 2),
        "ttft_ms": round(counts["ttft_s"] * 1e3, 1),
        "engine_send_ms_per_step": round(sending / steps * 1e3, 3),
        "wall_ms_per_step": round(seconds / steps * 1e3, 2),
    }


async def drive(port: int, arguments: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """What the client's process counted. Raises RuntimeError when a stream did not get all of its tokens."""
    wishes = [port, arguments.streams, rounds, arguments.max_tokens, arguments.route]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", __file__, "client", *map(str, wishes)), stdout=asyncio.subprocess.PIPE
    )
    told, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError("the client failed; see above")
    return json.loads(told)


def hardware() -> str:
    name = next(iter(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())), platform.machine())
    return f"{os.cpu_count()} cores of {name}"


# -- the engine's process -------------------------------------------------------------------------------------


class ScriptedClient(ProcessClient):
    """The real client, which starts this file as its engine."""


class ScriptedCore:
    """Gives every sequence one token of a text per step, and a step its time."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next = time.perf_counter()
        self._left: dict[str, int] = {}
        self._ids = Tokenizer(resolve("demo", None)).encode(TEXT)
        self.numbers = EngineStats()

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def add_request(self, request: AddRequest) -> None:
        if not self._left:
            self._next = time.perf_counter()
        self._left[request.request_id] = request.sampling_params.max_tokens or 0

    def abort_request(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def step(self) -> list[StepOutput]:
        self._next += self._step_s
        time.sleep(max(0.0, self._next - time.perf_counter()))
        self.numbers.steps_total += 1
        outputs = [self._output(request_id, left) for request_id, left in self._left.items()]
        self._left = {request_id: left - 1 for request_id, left in self._left.items() if left > 1}
        return outputs

    def _output(self, request_id: str, left: int) -> StepOutput:
        token_id = self._ids[(left + hash(request_id)) % len(self._ids)]
        return StepOutput(request_id=request_id, token_ids=[token_id], finish_reason="length" if left == 1 else None)

    def stats(self) -> EngineStats:
        return self.numbers


def run_engine(step_ms: str, address: str, parent: str) -> None:
    """`host_seconds_total` is the time that sending took."""
    core = ScriptedCore(float(step_ms) / 1e3)
    link = Link(address, int(parent))

    def send(message: Any) -> None:
        started = time.perf_counter()
        link.send(message)
        core.numbers.host_seconds_total += time.perf_counter() - started

    sizes = dict.fromkeys(EngineInfo.__struct_fields__, 1)
    names = dict.fromkeys(("model_path", "architecture", "device", "device_name", "dtype"), "scripted")
    kinds = {"state_dtype": "float32", "linear_backend": "auto", "kernels": "torch", "eos_token_ids": [0], "notes": []}
    bounds = {"vocab_size": 10**6, "max_model_len": 4096, "num_state_slots": 4096, "max_waiting": 4096}
    link.send(EngineInfo(**(sizes | names | kinds | bounds)))
    run_loop(core, link.receive, send)
    link.close()


# -- the client's process -------------------------------------------------------------------------------------


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


async def run_client(port: str, streams: str, rounds: str, max_tokens: str, route: str) -> None:
    body: dict[str, Any] = {"stream": True, "max_tokens": int(max_tokens), "stream_options": {"include_usage": True}}
    said = "Tell me of a river"
    body |= {"messages": [{"role": "user", "content": said}]} if "chat" in route else {"prompt": said}
    raw = json.dumps(body | {"ignore_eos": True}).encode()
    head = f"POST /v1/{route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
    readers: list[StreamReader] = []

    async def stream() -> None:
        for _ in range(int(rounds)):
            reader = StreamReader(request)
            await asyncio.get_running_loop().create_connection(lambda reader=reader: reader, "127.0.0.1", int(port))
            tail = await reader.done
            told = re.search(rb'"completion_tokens":(\d+)', tail)
            if told is None or int(told[1]) != int(max_tokens) or b"data: [DONE]\n\n" not in tail:
                raise SystemExit(f"a stream ended with {tail!r}")
            readers.append(reader)

    started = time.perf_counter()
    await asyncio.gather(*[stream() for _ in range(int(streams))])
    seconds = time.perf_counter() - started
    first = sorted(reader.ttft_s for reader in readers)
    chunks = sum(reader.chunks - 1 for reader in readers)  # without the one of usage
    told = {"streams": len(readers), "chunks": chunks, "seconds": seconds, "ttft_s": first[len(first) // 2]}
    print(json.dumps(told))


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        run_engine(*sys.argv[2:])
    elif sys.argv[1:2] == ["client"]:
        asyncio.run(run_client(*sys.argv[2:]))
    else:
        sys.exit(main())
