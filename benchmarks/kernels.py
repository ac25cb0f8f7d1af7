"""Measure the Triton kernels on a CUDA GPU against the floor that the device sets, and against other implementations.

    python -P benchmarks/kernels.py --out benchmarks/results/kernels-h100.json
    python -P benchmarks/kernels.py --only 'decode/h64/*' --no-peers --seconds 0.03

The floor of a kernel is the time in which a device-to-device copy moves the bytes that it must read and write once, or
in which a large matrix product does its arithmetic, whichever is longer. Both rates are measured here first. Decode and
small batches of experts are bound by bytes, prefill of softmax attention and large batches of experts by arithmetic.
For lightning attention the bytes are q, k, v, o once and each row's float32 state once in and once out; `replay` writes
it once in 16 steps and so goes below that floor; rows with drafts (`verify`) do not write it, but read and fill a ring.

Every kernel is checked against float64 on inputs of its own before it is timed; one of ours that fails is not timed,
and the exit status is 1. Times are medians over replays of a CUDA graph that calls the kernel on several sets of
inputs in turn, more than the L2 cache holds; what cannot be captured is timed by events around eager calls and says so.

Peers are measured where they can be imported: `fla-core`, and SGLang's two Triton files as the top-level modules
`lightning_attn` and `seg_la`. They get the inputs they want (contiguous, float32 for SGLang's prefill, the rows' states
side by side for fla), prepared outside the measured time. One that fails is reported with its reason, and the run goes
on. The last line is one JSON object.

A whole run takes minutes, most of them to compile, and with peers more than twice as long: fla alone tries about 50
variants of a kernel, for one row and again for several. Globs and --no-peers shorten that, --seconds the measurements
themselves. The cases are imported from `leyden.benchmarks`, so `leyden` must be this checkout (`pip install -e .`).
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import gc
import importlib
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from leyden.benchmarks import kernel_peers
from leyden.benchmarks.kernel_cases import all_cases
from leyden.benchmarks.kernel_cases.base import DEVICE, Bound, Case, Implementation, Limits, normal
from leyden.benchmarks.kernel_cases.lightning import LightningCase, VerifyCase
from torch import Tensor

# norm(error) / norm(result) in float64, bfloat16 inputs
BOUNDS = {"out": 5e-3, "residual": 5e-3, "state": 3e-3, "delta state": 5e-3, "ring": 0.0}
PEER_BOUND = 5e-2
LIMIT_SECONDS = 0.25
CHECK_SEED, TIMED_SEED = 1_000_000, 0
MIN_SETS, MAX_SETS, BYTES_OF_SETS = 4, 128, 200e6

say = functools.partial(print, flush=True)


# -- checking and timing ---------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """norm(actual - expected) / norm(expected); NaN where anything is."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(case: Case, implementation: Implementation, expected: dict[str, Tensor]) -> dict[str, float]:
    bound = implementation.bind(case.inputs(CHECK_SEED, checked=True))
    for i in range(case.num_steps):
        bound.step(i)
    return {name: relative_error(x, expected[name]) for name, x in zip(expected, bound.results(), strict=True)}


def excess(errors: dict[str, float], *, is_peer: bool) -> str | None:
    """Which error is above its bound, NaN included; None when none is."""
    for name, error in errors.items():
        bound = PEER_BOUND if is_peer else BOUNDS[name]
        if not error <= bound:
            return f"{name} error {error:.1e} is above {bound:.0e}"
    return None


def time_us(bounds: Sequence[Bound], num_steps: int, seconds: float) -> tuple[float, str]:
    """Median microseconds per step, and how they were taken. Every step goes through all inputs before the next."""

    def everything() -> None:
        for i in range(num_steps):
            for bound in bounds:
                bound.step(i)

    everything()  # compiles, tunes
    torch.cuda.synchronize()
    replay = captured(everything) if all(bound.capturable for bound in bounds) else None
    us = 1e6 * median_seconds(replay or everything, seconds) / (num_steps * len(bounds))
    return us, "graph" if replay else "events"


def captured(function: Callable[[], object]) -> Callable[[], None] | None:
    """`function` as a CUDA graph, or None where something in it cannot be captured."""
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except Exception as error:
        torch.cuda.set_stream(stream)  # a capture that fails may leave its own stream current
        torch.cuda.synchronize()
        say(f"    not captured: {first_line(error)}")
        return None
    return graph.replay


def median_seconds(function: Callable[[], object], budget: float, most: int = 200) -> float:
    """Of about `budget` seconds of calls, enqueued back to back so that the device never waits between two."""
    once = statistics.median(elapsed_seconds(function, 3))
    return statistics.median(elapsed_seconds(function, max(5, min(most, int(budget / max(once, 1e-6))))))


def elapsed_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 2)]
    for mark in marks[:-1]:
        mark.record()
        function()
    marks[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks[1:])]


def measure_limits(seconds: float) -> Limits:
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE).zero_()
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), seconds)
    num_bytes, n = 2 * source.numel(), 8192
    a, b = normal(0, n, n), normal(1, n, n)
    return Limits(num_bytes / copy, 2 * n**3 / median_seconds(lambda: a @ b, seconds))


def measure(case: Case, limits: Limits, seconds: float, peers: bool) -> dict[str, Any]:
    """The case's entry of the report; prints as it goes."""
    expected = case.expected(case.inputs(CHECK_SEED, checked=True))
    first = case.inputs(TIMED_SEED, checked=False)
    num_sets = sets_for(case.work(first).num_bytes)
    sets = [first, *[case.inputs(TIMED_SEED + 10 * i, checked=False) for i in range(1, num_sets)]]
    floor = statistics.mean(case.work(inputs).floor_us(limits) for inputs in sets)
    entry = {"case": case.name, "group": case.group, "label": case.label, "floor_us": rounded(floor)}
    if isinstance(case, LightningCase | VerifyCase):
        entry["heads"] = case.heads
    say(f"\n{case.name}  floor {floor:.1f} us, {num_sets} sets of inputs")
    results = {}
    for name, implementation in implementations(case, peers).items():
        results[name] = measure_one(case, implementation, expected, sets, floor, seconds)
        print_result(name, results[name])
    add_ratios(results)
    return entry | {"results": results}


def implementations(case: Case, peers: bool) -> dict[str, Implementation]:
    """Leyden's first; then PyTorch's and the peers', if wanted."""
    if peers:
        return case.implementations() | kernel_peers.implementations(case)
    return {name: ours for name, ours in case.implementations().items() if not ours.is_peer}


def sets_for(num_bytes: float) -> int:
    return min(MAX_SETS, max(MIN_SETS, math.ceil(BYTES_OF_SETS / num_bytes)))


def measure_one(
    case: Case,
    implementation: Implementation,
    expected: dict[str, Tensor],
    sets: Sequence[Any],
    floor: float,
    seconds: float,
) -> dict[str, Any]:
    """A failure is reported, and the run goes on. A result is timed if it is correct, or a peer's."""
    result: dict[str, Any] = {"peer": implementation.is_peer}
    try:
        release_memory()  # of the one before
        errors = check(case, implementation, expected)
        result["errors"] = {name: rounded(error) for name, error in errors.items()}
        wrong = excess(errors, is_peer=implementation.is_peer)
        if wrong:
            result["inaccurate" if implementation.is_peer else "failure"] = wrong
        if "failure" not in result:
            us, timed_by = time_us([implementation.bind(inputs) for inputs in sets], case.num_steps, seconds)
            result |= {"us": rounded(us), "times_floor": rounded(us / floor), "timed_by": timed_by}
    except Exception as error:
        result["failure"] = first_line(error)
    return result


def rounded(value: float, digits: int = 4) -> float | None:
    """To significant digits; JSON has no NaN."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def release_memory() -> None:
    """A graph's memory returns to the device only so."""
    gc.collect()
    torch.cuda.empty_cache()


def print_result(name: str, result: dict[str, Any]) -> None:
    errors = "  ".join(f"{key} {value}" for key, value in result.get("errors", {}).items())
    if "us" in result:
        share = f"{result['us']:>9.1f} us {result['times_floor']:>7.2f}x floor {100 / result['times_floor']:>5.0f} %"
        say(f"  {name:<16}{share}  {result['timed_by']:<6}  error: {errors}  {result.get('inaccurate', '')}")
    else:
        say(f"  {name:<16} FAILED {result['failure']}  {errors}")


def add_ratios(results: dict[str, dict[str, Any]]) -> None:
    """How long each takes beside torch's flash attention, where that was measured."""
    flash = results.get("torch flash", {}).get("us")
    for name, result in results.items():
        if flash and "us" in result and name != "torch flash":
            result["times_flash"] = rounded(result["us"] / flash)
            say(f"  {name}: {result['times_flash']:.2f}x torch flash")


def own_failures(entries: list[dict[str, Any]]) -> list[str]:
    return [
        f"{entry['case']} {name}: {result['failure']}"
        for entry in entries
        for name, result in entry["results"].items()
        if "failure" in result and not result["peer"]
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help="cases by name: 'decode/h64/*'")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="measure ours alone")
    parser.add_argument("--seconds", type=float, default=0.1, help="spent on each measurement (%(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here too")
    return parser.parse_args(arguments)


def chosen_cases(globs: Sequence[str]) -> list[Case]:
    chosen = [case for case in all_cases() if any(fnmatch.fnmatch(case.name, glob) for glob in globs)]
    if not chosen:
        raise SystemExit(f"no case matches {' '.join(globs)}; there are {', '.join(c.name for c in all_cases())}")
    return chosen


def main() -> int:
    arguments = parse_arguments()
    cases = chosen_cases(arguments.only)
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA GPU and found none.", file=sys.stderr)
        return 2
    with torch.inference_mode():
        report = measure_all(cases, arguments.seconds, arguments.peers, arguments.out)
    for failure in report["failures"]:
        print(f"FAILED {failure}", file=sys.stderr)
    say(json.dumps(report))
    return 1 if report["failures"] else 0


def measure_all(cases: Sequence[Case], seconds: float, peers: bool, path: Path | None) -> dict[str, Any]:
    """The report, written to `path` after every case, so that a run cut short keeps its measurements."""
    limits = measure_limits(LIMIT_SECONDS)
    release_memory()
    versions = {"torch": torch.__version__, "triton": importlib.import_module("triton").__version__}
    report: dict[str, Any] = {
        "hardware": f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores",
        "software": versions | (kernel_peers.versions() if peers else {}),
        "copy_tb_per_s": rounded(limits.bytes_per_s / 1e12),
        "matrix_tflop_per_s": rounded(limits.flops_per_s / 1e12),
        "failures": [],
        "cases": [],
    }
    say("{hardware}: copies {copy_tb_per_s} TB/s, multiplies {matrix_tflop_per_s} Tflop/s".format(**report))
    for case in cases:
        try:
            entry = measure(case, limits, seconds, peers)
            report["cases"].append(entry)
            report["failures"] += own_failures([entry])
            release_memory()
        except (
            Exception
        ) as error:  # no memory, or a kernel took the device down: earlier measurements are still reported
            report["failures"].append(f"{case.name}: {first_line(error)}")
        if path:
            path.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    sys.exit(main())
