"""Measure a served model, as a client sees it over HTTP or as the engine alone does it.

    leyden's own server, started and stopped here:   python -P benchmarks/serving.py http --model demo
    any OpenAI-compatible server that is running:    python -P benchmarks/serving.py http --url http://127.0.0.1:8000
    the engine alone, token ids in and out:          python -P benchmarks/serving.py offline --model demo
    the same with random weights, on a GPU:          ... offline --model benchmarks/configs/moe --load-format dummy

`http` gives start to ready, time to first token and tokens per second. A single stream is bound by the latency of a
step; with more streams a step costs little more until the weights' bytes (GPU) or the arithmetic (CPU) take over.
Every request decodes exactly --max-tokens (ignore_eos), prompts differ, and the medians are over --requests rounds
after one of warm-up. `offline` submits each case's requests at once and takes the time until the last one ends, greedy,
after one such batch with short answers as warm-up. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

READY_SECONDS = 600


# requests, prompt tokens, answer tokens: latency of a step, then throughput of answers, then of prompts
OFFLINE_CASES = ["1x128x256", "32x128x256", "128x128x256", "256x128x256", "64x1024x256", "256x1024x128", "64x4096x1"]


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "http":
        with server(arguments) as (url, ready):
            report = asyncio.run(measure(url, arguments))
        report = {"model": arguments.model, "hardware": hardware(), "start_to_ready_s": ready, **report}
        print_table(report)
    else:
        report = {"model": arguments.model, "hardware": hardware(), **measure_offline(arguments)}
        print_offline_table(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    http = commands.add_parser("http", help="a server, from a client")
    http.add_argument("--url", default=None, help="measure this server instead of starting one")
    http.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="concurrent streams to measure")
    http.add_argument("--requests", type=int, default=5, help="rounds per number of streams")
    http.add_argument("--max-tokens", type=int, default=128, help="length of each answer")
    offline = commands.add_parser("offline", help="the engine alone")
    offline.add_argument("--cases", type=offline_case, nargs="+", default=[offline_case(c) for c in OFFLINE_CASES],
                         metavar="REQUESTSxPROMPTxANSWER", help=f"default: {' '.join(OFFLINE_CASES)}")  # fmt: skip
    offline.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy = random weights")
    offline.add_argument("--engine", nargs="*", default=[], metavar="KEY=VALUE", help="engine settings, as in YAML")
    for command in (http, offline):
        command.add_argument("--model", default="demo", help="model to serve")
        command.add_argument("--out", type=Path, default=None, help="write the JSON here too")
    return parser.parse_args(arguments)


def offline_case(text: str) -> tuple[int, int, int]:
    """(requests, prompt tokens, answer tokens)."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not REQUESTSxPROMPTxANSWER, such as 32x128x256")
    requests, prompt, answer = map(int, found.groups())
    return requests, prompt, answer


def measure_offline(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every case on one engine that has room for the largest."""
    from leyden.configs.schema import EngineConfig
    from leyden.engine.core import EngineCore

    settings: dict[str, Any] = {
        "max_num_seqs": max(requests for requests, _, _ in arguments.cases),
        "max_model_len": max(prompt + answer for _, prompt, answer in arguments.cases),
        "max_num_batched_tokens": 8192,
    } | dict(pair.split("=", 1) for pair in arguments.engine)
    core = EngineCore(EngineConfig(model=arguments.model, load_format=arguments.load_format, **settings))
    info = core.info()
    cases = []
    for requests, prompt, answer in arguments.cases:
        run_offline(core, info.vocab_size, requests, prompt, min(answer, 4))
        seconds = run_offline(core, info.vocab_size, requests, prompt, answer)
        case = {"requests": requests, "prompt": prompt, "answer": answer, "seconds": round(seconds, 4)}
        case["ms_per_step"] = round(seconds / answer * 1e3, 3)
        case["answer_tokens_per_s"] = round(requests * answer / seconds, 1)
        case["prompt_tokens_per_s"] = round(requests * prompt / seconds, 1)
        cases.append(case)
    return {"linear_backend": info.linear_backend, "dtype": info.dtype, "engine": settings, "cases": cases}


def run_offline(core: Any, vocab_size: int, requests: int, prompt: int, answer: int) -> float:
    """Seconds from the first request to the last token."""
    from leyden.engine.messages import AddRequest
    from leyden.engine.sampling_params import SamplingParams

    choose = random.Random(requests * prompt)
    params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
    prompts = [choose.choices(range(vocab_size), k=prompt) for _ in range(requests)]
    started, tokens = time.perf_counter(), 0
    for i, ids in enumerate(prompts):
        core.add_request(AddRequest(request_id=str(i), prompt_token_ids=ids, sampling_params=params))
    while core.has_work:
        tokens += sum(len(output.token_ids) for output in core.step())
    if tokens != requests * answer:
        raise SystemExit(f"expected {requests * answer} tokens, got {tokens}")
    return time.perf_counter() - started


def print_offline_table(report: dict[str, Any]) -> None:
    print(f"\n{report['model']} on {report['hardware']}, {report['linear_backend']}, {report['dtype']}")
    print(f"{'requests':>9} {'prompt':>7} {'answer':>7} {'ms/step':>9} {'answer tokens/s':>16} {'prompt tokens/s':>16}")
    for case in report["cases"]:
        print(
            f"{case['requests']:>9} {case['prompt']:>7} {case['answer']:>7} {case['ms_per_step']:>9} "
            f"{case['answer_tokens_per_s']:>16} {case['prompt_tokens_per_s']:>16}"
        )


@contextlib.contextmanager
def server(arguments: argparse.Namespace) -> Iterator[tuple[str, float | None]]:
    """(url, seconds from process start to the first 200 of /health)."""
    if arguments.url:
        yield arguments.url.rstrip("/"), None
        return
    started = time.perf_counter()
    command = [sys.executable, "-P", "-m", "leyden.server.cli", "serve", arguments.model, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        url = wait_for_address(process)
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.01)
        yield url, round(time.perf_counter() - started, 2)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def wait_for_address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        if found := re.match(r"\s+address\s+(\S+)", line):
            return found.group(1)
    raise SystemExit("the server did not start")


async def measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=READY_SECONDS) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        cases = []
        for streams in arguments.streams:
            await round_of(http, model, streams, 8, seed=0)
            rounds = [
                await round_of(http, model, streams, arguments.max_tokens, seed=1 + i)
                for i in range(arguments.requests)
            ]
            cases.append(summary(streams, rounds))
    return {"max_tokens": arguments.max_tokens, "requests": arguments.requests, "cases": cases}


async def round_of(
    http: httpx.AsyncClient, model: str, streams: int, max_tokens: int, seed: int
) -> dict[str, list[float] | float]:
    """One request on each stream at the same moment."""
    started = time.perf_counter()
    prompts = [f"Tell me a story about number {seed * 100 + i}." for i in range(streams)]
    first_tokens = await asyncio.gather(*[one(http, model, prompt, max_tokens) for prompt in prompts])
    return {"ttft": first_tokens, "seconds": time.perf_counter() - started, "tokens": streams * max_tokens}


async def one(http: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> float:
    """Seconds until the first chunk with a token; the stream is then read to its end."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0.7,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    started = time.perf_counter()
    first = None
    usage: dict[str, Any] = {}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
                if first is None and usage.get("completion_tokens", 0) > 0:
                    first = time.perf_counter() - started
    if first is None or usage["completion_tokens"] != max_tokens:
        raise SystemExit(f"expected {max_tokens} tokens, got {usage}")
    return first


def summary(streams: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    ttft = [value for entry in rounds for value in entry["ttft"]]
    rates = [entry["tokens"] / entry["seconds"] for entry in rounds]
    return {
        "streams": streams,
        "ttft_s": round(statistics.median(ttft), 4),
        "ttft_max_s": round(max(ttft), 4),
        "tokens_per_s": round(statistics.median(rates), 1),
    }


def hardware() -> str:
    """What the measurement ran on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found.group(1).strip() if found else name
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        gpu = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        return f"{gpu.stdout.strip().splitlines()[0]}, {cores} CPU cores"
    return f"{cores} cores of {name}"


def print_table(report: dict[str, Any]) -> None:
    print(f"\n{report['model']} on {report['hardware']}; start to ready: {report['start_to_ready_s']} s")
    print(f"{'streams':>8} {'first token (median)':>22} {'(slowest)':>12} {'tokens/s':>10}")
    for case in report["cases"]:
        first, slowest = f"{case['ttft_s'] * 1e3:.0f} ms", f"{case['ttft_max_s'] * 1e3:.0f} ms"
        print(f"{case['streams']:>8} {first:>22} {slowest:>12} {case['tokens_per_s']:>10}")


if __name__ == "__main__":
    sys.exit(main())
