"""A profiled step as a table: time of each kind of operation beside its floor, for the models in `benchmarks/configs`.

The floor of a kind is the time to move the bytes that must be moved once, at the speed of a copy, or to multiply at the
rate of a large product, whichever is longer; both speeds are those of the recorded run of `kernels.py`. `tables.py`
makes the tables with it; by itself it only says this.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

RING = 16  # tokens between two writes of a state (`replay`)

# An operation belongs to the first kind whose pattern its name has. Both MLPs of experts have kernels of these names.
KINDS = {
    "experts": r"^_(gate_up|down|sort|count|combine)_kernel",
    "router": r"^_route_kernel|sgemm|sm80_xmma_gemm_f32f32|splitKreduce_kernel<32, 16, int, float, float",
    "matrix products": r"^nvjet|^_row_kernel|splitKreduce",
    "lightning attention": r"^_(replay|verify|decode|segment|chunk|product|fold)_kernel",
    "softmax attention": r"^_(split|merge|prefill|rope_store)_kernel",
    "norms, silu": r"^_(add_rms_norm|rms_norm|gated_rms_norm|silu|silu_and_mul)_kernel",
    "sampling, copies, the rest": r"",
}


@dataclass(frozen=True)
class Step:
    """What a step of `leyden bench offline --profile` computes, as its name tells."""

    tokens: int
    rows: int
    context: float  # tokens before the step, of each row
    is_prefill: bool

    @classmethod
    def of(cls, profile: dict[str, Any]) -> Step:
        if found := re.fullmatch(r"decode, (\d+) rows after (\d+)", profile["name"]):
            rows, context = map(int, found.groups())
            return cls(rows, rows, context + profile["steps"] / 2, False)
        found = re.fullmatch(r"prefill, (\d+) tokens of (\d+) prompts", profile["name"])
        if not found:
            raise SystemExit(f"{profile['name']!r} is no profiled step")
        tokens, rows = map(int, found.groups())
        return cls(tokens, rows, 0, True)


def steps_table(profiles: list[dict[str, Any]], config: dict[str, Any], kernels: dict[str, Any]) -> str:
    """A column per step, decode first; a row per kind: milliseconds, and its floor in brackets where it has one."""
    profiles = sorted(profiles, key=lambda profile: (Step.of(profile).is_prefill, Step.of(profile).rows))
    rates = kernels["copy_tb_per_s"] * 1e12, kernels["matrix_tflop_per_s"] * 1e12
    columns = [(by_kind(profile), floors(config, Step.of(profile), *rates)) for profile in profiles]
    rows = {"ms per step": [profile["name"] for profile in profiles], "---": ["---:"] * len(profiles)}
    for kind in KINDS:
        if any(times.get(kind) for times, _ in columns):
            rows[kind] = [_cell(times.get(kind, 0.0), least.get(kind, 0.0)) for times, least in columns]
    rows["device"] = [_cell(profile["device_us"]) for profile in profiles]
    rows["wall"] = [_cell(profile["wall_us"]) for profile in profiles]
    rows["sum of the floors"] = [_cell(sum(least.values())) for _, least in columns]
    return "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())


def _cell(us: float, floor: float = 0.0) -> str:
    return f"{us / 1e3:.2f} ({floor / 1e3:.2f})" if floor else f"{us / 1e3:.2f}"


def by_kind(profile: dict[str, Any]) -> dict[str, float]:
    """Microseconds of each kind of operation."""
    times: dict[str, float] = {}
    for operation in profile["operations"]:
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, operation["name"]))
        times[kind] = times.get(kind, 0.0) + operation["us"]
    return times


def floors(config: dict[str, Any], step: Step, copy_rate: float, matrix_rate: float) -> dict[str, float]:
    """Microseconds by kind; rates in bytes and operations per second. bfloat16 weights and cache, float32 state."""
    d, H, H_kv, D = (config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    F, E, k, vocab = (
        config[name] for name in ("intermediate_size", "num_local_experts", "num_experts_per_tok", "vocab_size")
    )
    full = sum(config["attn_type_list"])
    layers = len(config["attn_type_list"])
    linear, T, B = layers - full, step.tokens, step.rows
    dense = linear * (4 * H * D + H * D) * d + full * (H + 2 * H_kv + H) * D * d + (layers * 3 * d * F if E == 1 else 0)
    hit = E * (1 - (1 - k / E) ** T)  # experts that T tokens meet, if they choose at random
    pairs = B * (T / B) ** 2 / 2 if step.is_prefill else 0
    state = B * H * D * D * 4
    work = {  # bytes, operations
        "matrix products": (2 * (dense + vocab * d), 2 * T * dense + 2 * B * vocab * d),
        "experts": (layers * 6 * hit * d * F, layers * 6 * T * k * d * F) if E > 1 else (0, 0),
        "lightning attention": (
            linear * (8 * T * H * D + (2 * state if step.is_prefill else state * (1 + 2 / RING) + 30 * B * H * D)),
            0,
        ),
        "softmax attention": (
            full * 4 * H_kv * D * (T if step.is_prefill else B * step.context),
            full * 4 * H * D * pairs,
        ),
    }
    return {kind: max(bytes_ / copy_rate, flop / matrix_rate) * 1e6 for kind, (bytes_, flop) in work.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    parser.print_help()
