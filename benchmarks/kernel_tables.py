"""The tables of docs/kernels.md, from runs of `benchmarks/kernels.py`. `benchmarks/tables.py` writes them."""

from __future__ import annotations

from typing import Any

KERNEL_GROUPS = {
    "prefill": "Lightning prefill and mixed steps, time over the floor",
    "decode": "Lightning decode, time per step over the floor",
    "verify": "Rows of 8 tokens with drafts, after 8 that wait in the ring, time over the floor",
    "delta-prefill": "Gated delta rule with convolution, norms and gates, 16 key and 32 value heads of 128: prompts "
    "and mixed steps, time and share of the rate that bounds it",
    "delta-decode": "The same, decode: time per step, and its floor if the state is written in every step as a share",
    "delta-verify": "The same, rows of 8 tokens with drafts, after 8 that wait in the ring",
    "attention-decode": "Softmax attention, decode over a paged cache, time and share of the copy bandwidth",
    "attention-prefill": "Softmax attention, prefill, time and share of the matrix rate",
    "linear": "One row times a bfloat16 matrix, N x K, time and share of the copy bandwidth",
    "around": "Around attention at hidden size 4096 (silu_ on 12,288 of 16,384 channels, silu_and_mul from 22,016 to "
    "11,008), time and share of the copy bandwidth",
    "sampling": "A token for each of 256 rows of bfloat16 logits, time and share of the copy bandwidth for one read",
    "moe": "64 experts of 1408, 4 per token, hidden size 2048: time and share of the rate that bounds it",
    "routing": "8 of 256 experts from the 4 best of 8 groups, time and share of the copy bandwidth",
}


def versions(software: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in software.items() if version)


def kernels_table(report: dict[str, Any]) -> str:
    """One table per group of `benchmarks/kernels.py`; implementations that were not measured have no column."""
    lines = [
        f"{report['hardware']}; {versions(report['software'])}. The floor is the time to move the bytes that must be "
        "read and written once "
        f"at the bandwidth of a copy ({report['copy_tb_per_s']:.2f} TB/s), or to multiply at the rate of a large "
        f"bfloat16 product ({report['matrix_tflop_per_s']:.0f} Tflop/s), whichever is longer."
    ]
    for group, title in KERNEL_GROUPS.items():
        cases = [case for case in report["cases"] if case["group"] == group]
        if cases:
            lines += ["", f"{title}:", "", *group_table(cases)]
    results = [result for case in report["cases"] for result in case["results"].values()]
    if any("inaccurate" in result for result in results):
        lines += ["", "\\* error above 5 % of the result."]
    if any(result.get("timed_by") == "events" for result in results):
        lines += ["", "† called from Python, which is part of the time: a CUDA graph cannot hold it."]
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
        return f"failed: {result['failure']}".replace("|", "\\|") if "failure" in result else "–"
    mark = ("\\*" if "inaccurate" in result else "") + ("†" if result.get("timed_by") == "events" else "")
    if "heads" in case:
        return f"{result['times_floor']:.2f}x{mark}"
    return f"{result['us']:.0f} µs, {100 / result['times_floor']:.0f} %{mark}"


# Where `auto` has to choose: (heads, rows, tokens of each).
CHOICES = ((64, 1, 8192), (16, 3, 4096), (32, 1, 8192), (16, 2, 4096), (8, 4, 2048), (16, 2, 512))
LONG_TOKENS = 1024


def choices_table(report: dict[str, Any]) -> str:
    """A row per case of `CHOICES`, the faster kernel in bold."""
    cases = {case["case"]: case["results"] for case in report["cases"]}
    lines = ["| heads | rows x tokens | long rows x heads | minimax | seg_la |", "|---:|---:|---:|---:|---:|"]
    for heads, rows, tokens in CHOICES:
        results = cases[f"prefill/h{heads}/{rows}x{tokens}"]
        times = [results[name]["times_floor"] for name in ("minimax", "seg_la")]
        cells = [f"**{t:.2f}x**" if t == min(times) else f"{t:.2f}x" for t in times]
        long = str(heads * rows) if tokens >= LONG_TOKENS else "–"
        lines.append(f"| {heads} | {rows} x {tokens} | {long} | {' | '.join(cells)} |")
    return "\n".join(lines)
