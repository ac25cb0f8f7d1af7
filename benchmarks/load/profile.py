"""Where the time of a step goes: traces of a few steady steps, and a table of their kernels.

A profiler slows the host, so the wall time is taken from as many steps just before, without it. The device's time is
the time in which a kernel or a copy ran. In the rest of the wall time the device was idle, waiting for the host or for
the next launch. Kernels that a CUDA graph replays are recorded like any other. On a CPU the table holds PyTorch's
operations, each without the operations that it called, and the wall time is taken from the profiled steps themselves.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...engine.core import EngineCore
from ...engine.messages import AddRequest
from .errors import BenchError
from .submit import clear, random_requests, submit

DECODE_STEPS = 16  # whole rounds of the replay backend, which writes its states once in 16 steps
WARM_UP_STEPS = 4
DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
MAX_NAME_CHARS = 90
QUIET = "99"  # above all severities: the profiler's library writes lines of its own between the tables
LEAST_SHARE = 0.005  # of an operation that gets a row of its own

Event = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """One row of the table, per step."""

    name: str
    calls: float
    us: float
    share: float  # of the sum over all rows


@dataclass(frozen=True)
class StepProfile:
    """A step of one kind. Times are microseconds per step."""

    name: str
    steps: int
    wall_us: float
    device_us: float
    idle_us: float
    calls: float
    trace: str
    operations: list[Operation]


def tokens_to_profile(num_requests: int, prompt: int, max_num_batched_tokens: int) -> int:
    """Answer tokens that a sequence may have when the last one of a decode batch has been profiled."""
    prefill_steps = -(-num_requests * prompt // max(1, max_num_batched_tokens - num_requests))
    return prefill_steps + WARM_UP_STEPS + 2 * DECODE_STEPS + 2  # one under way at either end


def profile_decode(core: EngineCore, num_requests: int, prompt: int, folder: Path) -> StepProfile:
    """Profile steps in which `num_requests` sequences, and nothing else, get a token each.

    Raises `BenchError` when they do not all run at once.
    """
    requests = random_requests(core, num_requests, prompt, core.max_model_len - prompt, seed=0)
    _prefill_all(core, requests)
    _timed(core, WARM_UP_STEPS)
    wall = _timed(core, DECODE_STEPS)
    path = folder / f"decode-{num_requests}x{prompt}.trace.json.gz"
    profiled_wall = _traced(core, DECODE_STEPS, path)
    if core.stats().num_running != num_requests:
        raise BenchError(
            f"{num_requests} sequences of {prompt} tokens did not all run to the end of the profile; "
            "profile fewer requests, or raise max_model_len or memory_fraction"
        )
    clear(core, requests)
    return _report(core, f"decode, {num_requests} rows after {prompt}", DECODE_STEPS, wall, profiled_wall, path)


def profile_prefill(core: EngineCore, prompt: int, folder: Path) -> StepProfile:
    """Profile one step that is full of prompts, as many as max_num_batched_tokens holds."""
    wanted = -(-core.config.max_num_batched_tokens // prompt)
    num_requests = min(wanted, core.config.max_num_seqs, core.plan.num_state_slots)
    tokens = min(num_requests * prompt, core.config.max_num_batched_tokens)
    path = folder / f"prefill-{tokens}.trace.json.gz"
    walls = []
    for attempt in range(3):  # the first one compiles, the second is timed, the third is profiled
        requests = random_requests(core, num_requests, prompt, 1, seed=attempt)
        submit(core, requests)
        walls.append(_traced(core, 1, path) if attempt == 2 else _timed(core, 1))
        clear(core, requests)
    return _report(core, f"prefill, {tokens} tokens of {num_requests} prompts", 1, walls[1], walls[2], path)


def print_profile(report: StepProfile) -> None:
    print(
        f"\n{report.name}: wall {report.wall_us / 1e3:.3f} ms per step, busy {report.device_us / 1e3:.3f} ms, "
        f"idle {report.idle_us / 1e3:.3f} ms; {report.steps} steps in {report.trace}"
    )
    print(f"{'calls':>8} {'µs per step':>12} {'share':>7}  operation")
    shown = [row for row in report.operations if row.share >= LEAST_SHARE]
    rest = report.operations[len(shown) :]
    if rest:
        calls, us, share = (sum(values) for values in zip(*((r.calls, r.us, r.share) for r in rest), strict=True))
        shown.append(Operation(f"{len(rest)} others", calls, us, share))
    for row in shown:
        print(f"{row.calls:>8.4g} {row.us:>12.1f} {row.share:>7.1%}  {row.name}")


def tabulate(durations: Iterable[tuple[str, float]], steps: int) -> list[Operation]:
    """(name, µs) of every call -> a row per shortened name, the longest first."""
    calls: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in durations:
        calls[short_name(name)].append(microseconds)
    total = sum(map(sum, calls.values())) or 1.0
    rows = [
        Operation(name, len(times) / steps, sum(times) / steps, sum(times) / total) for name, times in calls.items()
    ]
    return sorted(rows, key=lambda row: -row.us)


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces and parameters: `void at::f<int>(at::G)` -> `f<int>`."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b\w+::", "", name)
    depth = 0
    for index, char in enumerate(name):  # parameters open outside of all template arguments
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0 and index and name[index - 1] != " ":
            name = name[:index]
            break
    return name if len(name) <= MAX_NAME_CHARS else name[: MAX_NAME_CHARS - 1] + "…"


def busy_time(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of the events ran."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def self_times(events: Iterable[Event]) -> list[tuple[str, float]]:
    """(name, µs) of nested calls, each without the time of those within it."""
    own: list[list[Any]] = []
    open_calls: list[tuple[Event, int]] = []
    for event in sorted(events, key=lambda event: (event["tid"], event["ts"], -event["dur"])):
        while open_calls and not _holds(open_calls[-1][0], event):
            open_calls.pop()
        if open_calls:
            own[open_calls[-1][1]][1] -= event["dur"]
        open_calls.append((event, len(own)))
        own.append([event["name"], event["dur"]])
    return [(name, microseconds) for name, microseconds in own]


def _holds(outer: Event, inner: Event) -> bool:
    return outer["tid"] == inner["tid"] and inner["ts"] < outer["ts"] + outer["dur"]


def _prefill_all(core: EngineCore, requests: list[AddRequest]) -> None:
    """Step until each of them has its first token."""
    wanted = core.stats().prompt_tokens_total + sum(len(request.prompt_token_ids) for request in requests)
    submit(core, requests)
    while core.stats().prompt_tokens_total < wanted and core.has_work:
        core.step()


def _timed(core: EngineCore, steps: int) -> float:
    """Microseconds per step."""
    _synchronize(core)
    started = time.perf_counter()
    for _ in range(steps):
        core.step()
    _synchronize(core)
    return (time.perf_counter() - started) / steps * 1e6


def _traced(core: EngineCore, steps: int, path: Path) -> float:
    """Microseconds per step under the profiler, whose trace goes to `path`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    activities = [ProfilerActivity.CPU]
    if core.runner.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities):  # the first use loads CUPTI, which takes seconds
            _synchronize(core)
    with profile(activities=activities) as profiler:
        wall = _timed(core, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return wall


def _synchronize(core: EngineCore) -> None:
    if core.runner.device.type == "cuda":
        torch.cuda.synchronize(core.runner.device)


def _report(core: EngineCore, name: str, steps: int, wall: float, profiled_wall: float, path: Path) -> StepProfile:
    """Read the trace, and write its table as JSON beside it."""
    with gzip.open(path, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    if core.runner.device.type == "cuda":
        events = [event for event in events if event.get("cat") in DEVICE_WORK]
        durations, busy = [(event["name"], event["dur"]) for event in events], busy_time(events) / steps
    else:
        durations = self_times(event for event in events if event.get("cat") == "cpu_op")
        wall, busy = profiled_wall, sum(microseconds for _, microseconds in durations) / steps
    if not durations:
        raise BenchError(f"the profiler recorded nothing in {path}; is CUPTI usable here (NVIDIA driver permissions)?")
    calls, rows = len(durations) / steps, tabulate(durations, steps)
    report = StepProfile(name, steps, wall, busy, wall - busy, calls, path.name, rows)
    table = path.with_name(path.name.replace(".trace.json.gz", ".table.json"))
    table.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report
