"""Write the README's tables from the recorded runs in `benchmarks/results`, between their markers.

python -P benchmarks/tables.py [--check]     --check only says whether the README is up to date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def serving_table(report: dict[str, Any]) -> str:
    lines = [
        f"Embedded model, {report['hardware']}; start to ready {report['start_to_ready_s']} s; "
        f"{report['max_tokens']} tokens per answer.",
        "",
        "| streams | time to first token, median | slowest | tokens/s |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {case['streams']} | {case['ttft_s'] * 1e3:.0f} ms | {case['ttft_max_s'] * 1e3:.0f} ms "
        f"| {case['tokens_per_s']:.0f} |"
        for case in report["cases"]
    ]
    return "\n".join(lines)


def api_process_table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['streams']} streams of {report['max_tokens']} tokens; {report['hardware']}, shared by the API "
        "process, the scripted engine and the client.",
        "",
        "| step | tokens/s | chunks/s | API process, per token | of a core | time to first token, median |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {case['step_ms']:g} ms | {case['tokens_per_s']:,} | {case['chunks_per_s']:,} "
        f"| {case['cpu_us_per_token']:.0f} µs | {100 * case['cpu_share']:.0f} % | {case['ttft_ms']:.0f} ms |"
        for case in report["cases"]
    ]
    return "\n".join(lines)


KERNEL_GROUPS = {
    "prefill": "Lightning prefill and mixed steps, time over the floor",
    "decode": "Lightning decode, time per step over the floor",
    "attention-decode": "Softmax attention, decode over a paged cache, time and share of the copy bandwidth",
    "attention-prefill": "Softmax attention, prefill, time and share of the matrix rate",
    "moe": "64 experts of 1408, 4 per token, hidden size 2048: time and share of the rate that bounds it",
}


def kernels_table(report: dict[str, Any]) -> str:
    """One table per group of `benchmarks/kernels.py`; implementations that were not measured have no column."""
    versions = ", ".join(f"{name} {version}" for name, version in report["software"].items() if version)
    lines = [
        f"{report['hardware']}; {versions}. The floor is the time to move the bytes that must be read and written once "
        f"at the bandwidth of a copy ({report['copy_tb_per_s']:.2f} TB/s), or to multiply at the rate of a large "
        f"bfloat16 product ({report['matrix_tflop_per_s']:.0f} Tflop/s), whichever is longer."
    ]
    for group, title in KERNEL_GROUPS.items():
        cases = [case for case in report["cases"] if case["group"] == group]
        if cases:
            lines += ["", f"{title}:", "", *group_table(cases)]
    if any("inaccurate" in result for case in report["cases"] for result in case["results"].values()):
        lines += ["", "\\* error above 5 % of the result."]
    return "\n".join(lines)


def group_table(cases: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for case in cases for name in case["results"]))
    lines = [f"| case | floor | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for case in cases:
        label = f"{case['heads']} heads, {case['label']}" if "heads" in case else case["label"]
        cells = [kernel_cell(case, name) for name in names]
        lines.append(f"| {label} | {case['floor_us']:.0f} µs | {' | '.join(cells)} |")
    return lines


def kernel_cell(case: dict[str, Any], name: str) -> str:
    """Lightning kernels as a multiple of the floor, the others as a time and a share of what bounds them."""
    result = case["results"].get(name, {})
    if "us" not in result:
        return "failed" if "failure" in result else "–"
    mark = "\\*" if "inaccurate" in result else ""
    if "heads" in case:
        return f"{result['times_floor']:.2f}x{mark}"
    return f"{result['us']:.0f} µs, {100 / result['times_floor']:.0f} %{mark}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "serving-cpu": serving_table,
    "api-process-cpu": api_process_table,
    "kernels-h100": kernels_table,
}


def render(readme: str) -> str:
    """The README with every table as the results have it."""
    for name, table in TABLES.items():
        report = json.loads((RESULTS / f"{name}.json").read_text())
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(readme):
            raise SystemExit(f"README.md has no place for the table {name}")
        readme = pattern.sub(lambda m, text=table(report): f"{m.group(1)}{text}\n{m.group(2)}", readme)
    return readme


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text()
    after = render(before)
    if "--check" in sys.argv[1:]:
        print("up to date" if before == after else "README.md is stale; run benchmarks/tables.py")
        return int(before != after)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
