"""How long other clients wait while one sends something large: the longest gap of a running stream and of
/health.

    python -P benchmarks/stalls.py
    python -P benchmarks/stalls.py --cases 'nothing' '4 new system prompts of 1.9 MB' --seconds 5

A real server, with random weights so small that they cost nothing and a context of a million tokens. A process of its
own keeps one stream, asks /health every 5 ms and sends a short chat every 100 ms; another sends what the case says.
Where a case would keep the engine busy for minutes, its request asks for more tokens than the context has left, and is
refused once it has been read and tokenized. A gap of /health is the longest time from a request to its answer, one of
the stream the longest between two chunks, in which the engine's own steps have a part (`nothing` is what they make
alone). On a machine that others use the figures are theirs, too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from leyden.benchmarks.load.host import own_server
from leyden.benchmarks.load.machine import processor
from leyden.models.loading.checkpoint import resolve

GOAL_MS = 50.0
CONTEXT = 1 << 20
TOO_MANY = 1 << 21  # tokens: more than the context has
HEALTH_SECONDS, CHAT_SECONDS = 0.005, 0.1
SIZES = {
    "max_position_embeddings": CONTEXT,
    "layer_types": ["linear_attention"] * 2,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
    "num_local_experts": 1,
    "num_experts_per_tok": 1,
}
OWN_ARGS = "--load-format dummy --stats-interval 0 --log-level warning"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = "Once upon a time there was a river that ran from the mountains to the sea, past mills, inns and gardens. "


# -- requests ---------------------------------------------------------------------------------------------


def system_prompt(num_chars: int, number: int) -> dict[str, Any]:
    text = (f"Case {number} of {time.time()}. " + WORDS * (num_chars // len(WORDS) + 1))[:num_chars]
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "Hi"}]
    return {"messages": messages, "max_completion_tokens": TOO_MANY}


def empty_parts(count: int) -> dict[str, Any]:
    parts = [{"type": "text", "text": ""}] * 4000
    messages = [{"role": "user", "content": parts} for _ in range(count // len(parts) + 1)]
    return {"messages": messages, "max_completion_tokens": TOO_MANY}


def token_ids(count: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": [7 + i * 7919 % 4000 for i in range(count)], **fields}


def long_answer(num_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me of a river."}]
    return {"messages": messages, "max_tokens": num_tokens, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}


Requests = list[tuple[str, dict[str, Any]]]
# Name -> the requests that are sent at once, and after how many seconds their client leaves.
CASES: dict[str, tuple[Callable[[], Requests], float]] = {
    "nothing": (list, 0),
    "a new system prompt of 1.9 MB": (lambda: [(CHAT, system_prompt(1_900_000, 0))], 600),
    "4 new system prompts of 1.9 MB": (lambda: [(CHAT, system_prompt(1_900_000, i)) for i in range(4)], 600),
    "8 new system prompts of 0.4 MB": (lambda: [(CHAT, system_prompt(400_000, i)) for i in range(8)], 600),
    "a chat of 8,000 tokens, 20 alternatives each": (lambda: [(CHAT, long_answer(8000))], 600),
    "scores of a prompt of 100,000 tokens, 20 alternatives each": (
        lambda: [(COMPLETIONS, token_ids(100_000, echo=True, logprobs=20, max_tokens=0))],
        600,
    ),
    "a body of 330,000 token ids": (lambda: [(COMPLETIONS, token_ids(330_000, max_tokens=1))], 5),
    "a body of 1,000,000 token ids": (lambda: [(COMPLETIONS, token_ids(1_000_000, max_tokens=1))], 10),
    "74,000 empty parts of text": (lambda: [(CHAT, empty_parts(74_000))], 600),
}


def send(port: int, path: str, raw: bytes, leaves_after: float) -> str:
    """What became of it: a status and how much was read, or that the client left."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=leaves_after)
    try:
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return f"{response.status}, {len(response.read()) / 1e6:.1f} MB"
    except TimeoutError:
        return f"left after {leaves_after:g} s"
    finally:
        connection.close()


# -- a case ---------------------------------------------------------------------------------------------------


def measure(port: int, name: str, seconds: float) -> dict[str, Any]:
    """The longest gaps of a case, at least `seconds` long."""
    make, leaves_after = CASES[name]
    bodies = [(path, json.dumps(body).encode()) for path, body in make()]
    answers: list[str] = []
    with watching(port) as watcher:
        started = time.perf_counter()
        threads = [
            threading.Thread(target=lambda path=path, raw=raw: answers.append(send(port, path, raw, leaves_after)))
            for path, raw in bodies
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - started
        time.sleep(max(seconds - taken, 0.5))
    gaps = json.loads(watcher.stdout.read())
    return {"case": name, "seconds": round(taken, 2), "answers": sorted(answers), **gaps}


@contextlib.contextmanager
def watching(port: int) -> Iterator[subprocess.Popen[str]]:
    """A watcher that has begun to watch; its report is there to be read afterwards."""
    watcher = subprocess.Popen(
        [sys.executable, "-P", __file__, "watch", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdin is not None and watcher.stdout is not None
    if watcher.stdout.readline().strip() != "watching":
        raise RuntimeError("the stream did not begin; see above")
    yield watcher
    watcher.stdin.close()
    if watcher.wait(60):
        raise RuntimeError("watching failed; see above")


# -- the watcher's process ------------------------------------------------------------------------------------


class Gaps:
    """The longest of some times, in seconds."""

    def __init__(self) -> None:
        self.longest, self.count = 0.0, 0

    def add(self, seconds: float) -> None:
        self.longest, self.count = max(self.longest, seconds), self.count + 1


def watch(port: int) -> None:
    """Watch until stdin ends, then print the longest gaps."""
    has_begun, is_over = threading.Event(), threading.Event()
    gaps = {name: Gaps() for name in ("health", "stream", "short_chat")}
    chat = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}).encode()
    threads = [
        threading.Thread(target=follow, args=(port, gaps["stream"], has_begun, is_over), daemon=True),
        threading.Thread(target=ask, args=(port, "/health", None, HEALTH_SECONDS, gaps["health"], is_over)),
        threading.Thread(target=ask, args=(port, CHAT, chat, CHAT_SECONDS, gaps["short_chat"], is_over)),
    ]
    threads[0].start()
    if not has_begun.wait(60):
        sys.exit("no token came")
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.5)
    for each in gaps.values():
        each.longest = 0.0
    print("watching", flush=True)
    sys.stdin.read()
    is_over.set()
    for thread in threads:
        thread.join(30)
    print(json.dumps({f"{name}_ms": round(each.longest * 1e3, 1) for name, each in gaps.items()}))


def ask(port: int, path: str, body: bytes | None, every: float, gaps: Gaps, is_over: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while not is_over.wait(every):
        started = time.perf_counter()
        connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        gaps.add(time.perf_counter() - started)
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}")


def follow(port: int, gaps: Gaps, has_begun: threading.Event, is_over: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "Once", "max_tokens": CONTEXT // 2, "ignore_eos": True, "stream": True, "priority": -1}
    connection.request("POST", COMPLETIONS, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    last = time.perf_counter()
    while not is_over.is_set():
        line = response.readline()
        if line.startswith(b"data: "):
            now = time.perf_counter()
            gaps.add(now - last)
            last = now
            has_begun.set()
    connection.close()


# -- the server -----------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path) -> None:
    """The demo's tokenizer and template before a model that is a few small layers."""
    demo = resolve("demo", None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(demo / name, folder)
    config = json.loads((demo / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SIZES))


def print_table(report: dict[str, Any]) -> None:
    print(f"\nlongest gaps in ms, {report['hardware']}")
    print(f"{'beside':60} {'/health':>8} {'stream':>8} {'short chat':>11}")
    for case in report["cases"]:
        print(f"{case['case']:60} {case['health_ms']:>8} {case['stream_ms']:>8} {case['short_chat_ms']:>11}")
    print(f"goal, at most {report['goal_ms']:g} ms of /health and stream: {'met' if report['is_met'] else 'missed'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="by their names")
    parser.add_argument("--seconds", type=float, default=3.0, help="that a case takes at least")
    parser.add_argument("--serve-args", default="", help="more arguments of the server")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="leyden-") as folder:
        write_checkpoint(Path(folder))
        with own_server(folder, f"{OWN_ARGS} {arguments.serve_args}") as (url, _):
            port = urlsplit(url).port or 0
            cases = [measure(port, name, arguments.seconds) for name in arguments.cases]
    is_met = all(max(case["health_ms"], case["stream_ms"]) <= GOAL_MS for case in cases)
    report = {"hardware": processor(), "goal_ms": GOAL_MS, "is_met": is_met, "cases": cases}
    print_table(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        watch(int(sys.argv[2]))
    else:
        sys.exit(main())
