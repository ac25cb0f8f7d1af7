"""A profiled step as a table: time of each kind of operation beside its floor, for the models in `benchmarks/configs`.

The floor of a kind is the time to move the bytes that must be moved once, at the speed of a copy, or to multiply at the
rate of a large product, whichever is longer; both speeds come from the recorded run of `kernels.py`. `tables.py`
makes the tables with it; by itself it only says this.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from leyden.models.families.registry import from_hf
from leyden.models.specs import ExpertsSpec, GatedDeltaSpec, LightningSpec, MixerSpec, SoftmaxSpec

RING = 16  # tokens between two writes of a state (`replay`)

# An operation belongs to the first kind whose pattern its name has. Both MLPs of experts have kernels of these names.
KINDS = {
    "experts": r"^_(gate_up|down|sort|count|combine)_kernel",
    "router": r"^_route(_groups)?_kernel|sgemm|sm80_xmma_gemm_f32f32|splitKreduce_kernel<32, 16, int, float, float",
    "matrix products": r"^nvjet|^_row_kernel|splitKreduce",
    "linear attention": r"^_(rope|replay|verify|decode|segment|chunk|product|fold|convolve|prepare|walk)_kernel",
    "softmax attention": r"^_(split|merge|prefill|rope_store)_kernel",
    "norms, silu": r"^_(add_rms_norm|rms_norm|gated_rms_norm|gate|silu|silu_and_mul)_kernel",
    "sampling, copies, the rest": r"",
}


class Work(NamedTuple):
    """Bytes that must be moved, and operations of products."""

    num_bytes: float
    flop: float


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
    spec = from_hf(config)
    T, d, dense, head = step.tokens, spec.hidden_size, 0, spec.vocab_size * spec.hidden_size
    experts: list[Work] = []
    linear: list[Work] = []
    softmax: list[Work] = []
    for layer in spec.layers:
        dense += d * (_mixer_rows(layer.mixer) + 3 * (layer.shared.width if layer.shared else 0))
        if isinstance(layer.mlp, ExpertsSpec):
            experts.append(_experts_work(layer.mlp, T, d))
        else:
            dense += 3 * d * layer.mlp.width
        if isinstance(layer.mixer, LightningSpec):
            linear.append(Work(_lightning_bytes(layer.mixer, step), 0))
        elif isinstance(layer.mixer, GatedDeltaSpec):
            linear.append(Work(_delta_bytes(layer.mixer, step), 0))
        else:
            softmax.append(_softmax_work(layer.mixer, step))
    work = {
        "matrix products": [Work(2 * (dense + head), 2 * T * dense + 2 * step.rows * head)],
        "experts": experts,
        "linear attention": linear,
        "softmax attention": softmax,
    }
    seconds = {}
    for kind, parts in work.items():
        num_bytes, flop = sum(part.num_bytes for part in parts), sum(part.flop for part in parts)
        seconds[kind] = max(num_bytes / copy_rate, flop / matrix_rate)
    return {kind: value * 1e6 for kind, value in seconds.items()}


def _mixer_rows(mixer: MixerSpec) -> int:
    """Rows of all matrices of a mixer, each as long as the hidden size."""
    if isinstance(mixer, LightningSpec):
        return 5 * mixer.num_heads * mixer.head_dim
    if isinstance(mixer, GatedDeltaSpec):
        keys, values = mixer.num_key_heads * mixer.key_dim, mixer.num_value_heads * mixer.value_dim
        return 2 * keys + 3 * values + 2 * mixer.num_value_heads
    return ((3 if mixer.has_gate else 2) * mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim


def _experts_work(spec: ExpertsSpec, num_tokens: int, d: int) -> Work:
    hit = spec.num_experts * (1 - (1 - spec.top_k / spec.num_experts) ** num_tokens)  # if tokens choose at random
    return Work(6 * hit * d * spec.width, 6 * num_tokens * spec.top_k * d * spec.width)


def _lightning_bytes(mixer: LightningSpec, step: Step) -> float:
    """Prefill reads and writes each state; decode reads it, writes it once per ring, and reads half a ring."""
    width, state = mixer.num_heads * mixer.head_dim, 4 * step.rows * math.prod(mixer.state_shape)
    kept = 2 * state if step.is_prefill else state * (1 + 2 / RING) + 30 * step.rows * width
    return 8 * step.tokens * width + kept


def _delta_bytes(mixer: GatedDeltaSpec, step: Step) -> float:
    """As of lightning attention. A ring holds a token's keys in bfloat16, and its corrections in float32."""
    keys, values = mixer.num_key_heads * mixer.key_dim, mixer.num_value_heads * mixer.value_dim
    state = 4 * step.rows * values * mixer.key_dim
    kept = 2 * state if step.is_prefill else state * (1 + 2 / RING) + RING / 2 * step.rows * (2 * keys + 4 * values)
    return 2 * step.tokens * (2 * keys + 2 * values) + kept


def _softmax_work(mixer: SoftmaxSpec, step: Step) -> Work:
    num_read = step.tokens if step.is_prefill else step.rows * step.context
    pairs = step.rows * (step.tokens / step.rows) ** 2 / 2 if step.is_prefill else 0
    return Work(4 * mixer.num_kv_heads * mixer.head_dim * num_read, 4 * mixer.num_heads * mixer.head_dim * pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    parser.print_help()
