"""What a token costs the API process: the real app, tokenizer and link between a scripted engine and raw sockets.

    python -P benchmarks/api_process.py                      256 streams of 128 tokens at several times of a step
    python -P benchmarks/api_process.py --step-ms 0          an engine that is faster than HTTP can be

This process is the API process; the engine, which speaks `engine/messages.py` and computes nothing, and the client,
`raw_streams.py`, are processes of their own. While the process keeps up, µs per token is the measure: at 60 µs one core
carries 16,600 tokens/s. When it does not, tokens pile up and leave as fewer chunks; every stream must still be told
exactly --max-tokens. A core that sleeps between steps or is shared counts more µs for the same work than a busy one of
its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from leyden.benchmarks.load.machine import processor
from leyden.configs.schema import Settings
from leyden.engine.async_llm import AsyncLLM
from leyden.engine.boundary.loop import run_loop
from leyden.engine.boundary.process import connect
from leyden.engine.boundary.process_client import ProcessClient
from leyden.engine.messages import AddRequest, EngineInfo, EngineStats, MemoryUse, SessionDone
from leyden.engine.outputs import StepOutput
from leyden.engine.text.tokenizer import Tokenizer
from leyden.models.loading.checkpoint import resolve
from leyden.server.commands.serve import bind
from leyden.server.commands.service import Service
from leyden.server.http.app import create_app

TEXT = "Once upon a time there was a river that ran from the mountains to the sea, past mills and inns. " * 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256, help="concurrent streams")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream, one after the other")
    parser.add_argument("--max-tokens", type=int, default=128, help="length of each answer")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[19.0, 12.0, 0.0], help="times of an engine step")
    parser.add_argument("--route", choices=("completions", "chat/completions"), default="completions", help="API route")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here too")
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("streams", "max_tokens", "route")}
    cases = [asyncio.run(measure(arguments, step_ms)) for step_ms in arguments.step_ms]
    report = {"hardware": processor(), **sizes, "cases": cases}
    print_table(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


async def measure(arguments: argparse.Namespace, step_ms: float) -> dict[str, Any]:
    """One round of warm-up, then the measured ones."""
    settings = Settings(model="demo", max_num_seqs=arguments.streams, port=0, stats_interval=0, log_level="warning")
    ScriptedClient.ENGINE = ("-P", __file__, "engine", str(step_ms))
    client = ScriptedClient(settings.engine())
    listener = bind(settings.host, settings.port)
    listener.listen(arguments.streams)  # the client may be quicker than the app
    try:
        await client.start()
        app = create_app(AsyncLLM(client, Tokenizer(resolve("demo", None))), settings, model_name="demo")
        service = Service(settings, client, app)
        serving = asyncio.create_task(service.run(listener))
        await drive(listener.getsockname()[1], arguments, rounds=1)
        case = {"step_ms": step_ms, **await timed(listener.getsockname()[1], arguments, client)}
        service.server.should_exit = True
        await serving
    finally:
        await client.close()
        listener.close()
    return case


async def timed(port: int, arguments: argparse.Namespace, client: ProcessClient) -> dict[str, Any]:
    before, cpu = client.stats, time.process_time()
    counts = await drive(port, arguments, rounds=arguments.rounds)
    seconds, cpu = counts["seconds"], time.process_time() - cpu
    steps = client.stats.steps_total - before.steps_total
    sending = client.stats.host_seconds_total - before.host_seconds_total
    tokens = counts["streams"] * arguments.max_tokens
    return {
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
    script = str(Path(__file__).with_name("raw_streams.py"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", script, *map(str, wishes)), stdout=asyncio.subprocess.PIPE
    )
    told, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError("the client failed; see above")
    return json.loads(told)


def print_table(report: dict[str, Any]) -> None:
    print(f"\n{report['streams']} streams of {report['max_tokens']} tokens on {report['hardware']}")
    print(f"{'step':>8} {'tokens/s':>10} {'chunks/s':>10} {'µs per token':>14} {'of a core':>10} {'first token':>12}")
    for case in report["cases"]:
        print(f"{case['step_ms']:>5g} ms {case['tokens_per_s']:>10} {case['chunks_per_s']:>10} "
              f"{case['cpu_us_per_token']:>14} {case['cpu_share']:>10.0%} {case['ttft_ms']:>9} ms")  # fmt: skip


# -- the engine's process -------------------------------------------------------------------------------------


class ScriptedClient(ProcessClient):
    """The real client, which starts this file as its engine."""


class NoSessions:
    """Nothing is saved, and no client asks."""

    def advance(self) -> list[SessionDone]:
        return []


class ScriptedCore:
    """Gives every sequence one token of a text per step, and a step its time."""

    sessions = NoSessions()

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

    def step(self, _tell_started: Any) -> list[StepOutput]:
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


def run_engine(step_ms: str, address: str, parent: str, *_how_to_log: str) -> None:
    """The scripted engine: `host_seconds_total` counts the time of sending."""
    core = ScriptedCore(float(step_ms) / 1e3)
    link = connect(address, int(parent))

    def send(message: Any) -> None:
        started = time.perf_counter()
        link.send(message)
        core.numbers.host_seconds_total += time.perf_counter() - started

    sizes = dict.fromkeys(EngineInfo.__struct_fields__, 1)
    names = dict.fromkeys(("model_path", "architecture", "device", "device_name", "dtype"), "scripted")
    kinds = {"state_dtype": "float32", "linear_backend": "auto", "kernels": "torch", "eos_token_ids": [0], "notes": []}
    kinds |= {"memory": MemoryUse(total=1), "has_sessions": False, "layer_counts": {"lightning": 1}}
    bounds = {"vocab_size": 10**6, "max_model_len": 4096, "num_state_slots": 4096, "max_waiting": 4096}
    link.send(EngineInfo(**(sizes | names | kinds | bounds | {"quantised_bytes": {}})))
    run_loop(core, link.receive, send)
    link.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        run_engine(*sys.argv[2:])
    else:
        sys.exit(main())
