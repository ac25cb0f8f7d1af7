"""What `benchmarks/kernels.py` computes without a GPU: its reference, its floors, its checks and its tables."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from leyden.benchmarks import kernel_peers as peers
from leyden.benchmarks import kernel_tables as tables
from leyden.benchmarks.kernel_cases import all_cases, around, attention, base, delta, experts, lightning, sampling
from leyden.kernels import load
from leyden.kernels.bundles import Rows
from leyden.kernels.lightning.reference import recurrence

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


benchmark = load_script("kernels")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases on the CPU, in float32, with the PyTorch kernels in place of Triton's."""
    monkeypatch.setattr(base, "DEVICE", "cpu")
    monkeypatch.setattr(base, "DTYPE", torch.float32)
    monkeypatch.setattr(base, "our_kernels", lambda: load("torch"))
    yield
    lightning.lightning_batch.cache_clear()
    experts.expert_weights.cache_clear()
    delta.layer_weights.cache_clear()


SMALL_CASES = [
    lightning.LightningCase("mixed", 2, (70, 3, 1), 2),
    lightning.LightningCase("B=3", 2, (), 3),
    lightning.VerifyCase(heads=2, num_rows=3),
    delta.DeltaCase("mixed", (70, 3), 1),
    delta.DeltaCase("B=2", (), 2),
    delta.DeltaVerifyCase(num_rows=2),
    attention.AttentionCase(is_prefill=False, num_rows=2, length=48, head_dim=16, heads=4, kv_heads=2),
    attention.AttentionCase(is_prefill=True, num_rows=2, length=32, head_dim=16, heads=4, kv_heads=2),
    experts.MoeCase(5, num_experts=4, top_k=2, size=24, width=16),
    experts.RoutingCase(5, num_experts=12, num_groups=3, top_groups=2, top_k=4),
    around.LinearCase(24, 40),
    *[around.AroundCase(operation, 3) for operation in around.OPERATIONS],
    *[sampling.SamplingCase(sampler, rows=6, vocab=300) for sampler in sampling.SAMPLERS],
]
OWN = [
    (case, name)
    for case in SMALL_CASES
    for name, implementation in case.implementations().items()
    if not implementation.is_peer
]


def test_reference_by_blocks_is_the_recurrence():
    generator = torch.Generator().manual_seed(0)
    lengths, heads, dim = [1, 40, 17, 32], 3, 8
    q, k, v = (torch.randn(sum(lengths), heads, dim, generator=generator) for _ in range(3))
    arguments = (
        lightning.alibi_slopes(heads),
        0.3,
        torch.randn(6, heads, dim, dim, generator=generator),
        Rows(
            torch.tensor([4, 0, 5, 2]),
            torch.tensor([True, False, True, False]),
            torch.tensor([0, *lengths]).cumsum(0),
            max(lengths),
        ),
    )
    out, state = lightning.blocked_recurrence(q, k, v, *arguments, block=16)
    expected_out, expected_state = recurrence(q, k, v, *arguments)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("case", "name"), OWN, ids=[f"{case.name}-{name}" for case, name in OWN])
def test_own_implementations_pass_the_check(case, name, on_cpu):
    expected = case.expected(case.inputs(benchmark.CHECK_SEED, checked=True))
    errors = benchmark.check(case, case.implementations()[name], expected)
    assert benchmark.excess(errors, is_peer=False) is None
    assert name in ("replay bf16", "replay fp16") or max(errors.values()) < 2e-6  # float32 inputs


def test_a_kernel_that_writes_nothing_is_a_failure_and_is_not_timed(on_cpu, monkeypatch):
    monkeypatch.setattr(benchmark, "time_us", lambda *_: pytest.fail("timed"))
    case = SMALL_CASES[0]
    expected = case.expected(case.inputs(benchmark.CHECK_SEED, checked=True))
    idle = base.Implementation(lambda x: lightning.in_place(x, lambda i: None))
    result = benchmark.measure_one(case, idle, expected, [], 1.0, 0.1)
    assert result["failure"].startswith("out error nan")
    assert result["errors"]["out"] is None
    failures = benchmark.own_failures([{"case": "c", "results": {"idle": result, "peer": result | {"peer": True}}}])
    assert failures == [f"c idle: {result['failure']}"]


def test_a_peer_that_fails_is_reported_with_its_reason_and_is_no_failure_of_ours(on_cpu, monkeypatch):
    def bind(inputs):
        raise TypeError("no such argument\nand more")

    modules = {
        "lightning_attn": ModuleType("lightning_attn"),
        "seg_la": "ImportError: none",
        "fla": "ImportError: none",
    }
    monkeypatch.setattr(peers, "peer_module", modules.get)
    monkeypatch.setattr(peers, "bind_sglang_minimax_prefill", bind)
    case = SMALL_CASES[0]
    found = benchmark.implementations(case, peers=True)
    assert set(found) - set(case.implementations()) == {"sglang minimax"}
    result = benchmark.measure_one(case, found["sglang minimax"], {}, [], 1.0, 0.1)
    assert result == {"peer": True, "failure": "TypeError: no such argument"}
    assert benchmark.own_failures([{"case": "c", "results": {"sglang minimax": result}}]) == []


def test_without_peers_ours_alone_are_measured(monkeypatch):
    monkeypatch.setattr(peers, "peer_module", lambda name: ModuleType(name))
    assert set(benchmark.implementations(around.LinearCase(8, 8), peers=False)) == {"leyden"}
    assert set(benchmark.implementations(around.LinearCase(8, 8), peers=True)) == {"leyden", "torch"}
    between_ours = [case for case in benchmark.all_cases() if not getattr(case, "has_peers", True)]
    assert between_ours and all(peers.implementations(case) == {} for case in between_ours)


def test_every_group_has_a_table():
    assert {case.group for case in benchmark.all_cases()} == set(tables.KERNEL_GROUPS)


def test_floors():
    limits = base.Limits(3.01e12, 800e12)
    (prefill,) = benchmark.chosen_cases(["prefill/h64/1x2048"])
    num_bytes = 2048 * 64 * 128 * 4 * 2 + 2 * 64 * 128 * 128 * 4
    assert prefill.work().num_bytes == num_bytes
    assert prefill.work().floor_us(limits) == pytest.approx(47.4, abs=0.05)
    (decode,) = benchmark.chosen_cases(["decode/h64/b64"])
    assert decode.work().floor_us(limits) == pytest.approx(179.8, abs=0.1)
    (verify,) = benchmark.chosen_cases(["verify/h64/b8"])
    assert verify.work().num_bytes == 8 * 64 * (128 * 128 * 4 + (2 * 8 + 6 * 8) * 128 * 2)
    (attention,) = benchmark.chosen_cases(["attention-prefill/*/1x4096"])
    assert attention.work().flops == 4 * 32 * 128 * sum(range(1, 4097))
    (moe,) = benchmark.chosen_cases(["moe/t8192"])
    (linear,) = benchmark.chosen_cases(["linear/4096x11008"])
    assert linear.work().num_bytes == 4096 * 11008 * 2
    (silu,) = benchmark.chosen_cases(["around/silu_/t128"])
    assert silu.work().num_bytes == 2 * 128 * 12288 * 2
    (add,) = benchmark.chosen_cases(["around/add_rms_norm/t8192"])
    assert add.work().num_bytes == 4 * 8192 * 4096 * 2
    (gate,) = benchmark.chosen_cases(["around/silu_and_mul/t8192"])
    assert gate.work().num_bytes == 8192 * (22016 + 11008) * 2
    (gated,) = benchmark.chosen_cases(["around/gated_rms_norm/t8192"])
    assert gated.work().num_bytes == 3 * 8192 * 4096 * 2
    assert moe.work_for(64).floor_us(limits) == pytest.approx(6 * 8192 * 4 * 2048 * 1408 / 800e6)


def test_case_names_are_unique_and_a_glob_without_a_match_is_refused():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    with pytest.raises(SystemExit, match="no case matches"):
        benchmark.chosen_cases(["decoed/*"])


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    assert benchmark.main() == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_sets_exceed_the_l2_cache_without_end():
    assert benchmark.sets_for(1e9) == 4
    assert benchmark.sets_for(20e6) == 10
    assert benchmark.sets_for(1e3) == 128


def test_a_report_becomes_tables():
    def entry(group, label, results, **more):
        return {"case": label, "group": group, "label": label, "floor_us": 47.4, "results": results, **more}

    report = {
        "hardware": "a GPU, 16 CPU cores",
        "software": {"torch": "2.11.0", "seg_la": None},
        "copy_tb_per_s": 3.01,
        "matrix_tflop_per_s": 745.0,
        "failures": [],
        "cases": [
            entry("prefill", "1 x 2048", {"minimax": {"us": 94.8, "times_floor": 2.0}, "fla": {}}, heads=64),
            entry("prefill", "64 x 128", {"sglang": {"us": 94.8, "times_floor": 2.0, "inaccurate": "out"}}, heads=16),
            entry("linear", "8 x 4", {"leyden": {"us": 60.0, "times_floor": 1.25, "timed_by": "events"}}),
            entry("moe", "T=1", {"leyden": {"us": 60.0, "times_floor": 1.25}, "other": {"failure": "no memory"}}),
        ],
    }
    assert tables.kernels_table(report).splitlines()[1:] == [
        "",
        "Lightning prefill and mixed steps, time over the floor:",
        "",
        "| case | floor | minimax | fla | sglang |",
        "|---|---:|---:|---:|---:|",
        "| 64 heads, 1 x 2048 | 47 µs | 2.00x | – | – |",
        r"| 16 heads, 64 x 128 | 47 µs | – | – | 2.00x\* |",
        "",
        "One row times a bfloat16 matrix, N x K, time and share of the copy bandwidth:",
        "",
        "| case | floor | leyden |",
        "|---|---:|---:|",
        "| 8 x 4 | 47 µs | 60 µs, 80 %† |",
        "",
        "64 experts of 1408, 4 per token, hidden size 2048: time and share of the rate that bounds it:",
        "",
        "| case | floor | leyden | other |",
        "|---|---:|---:|---:|",
        "| T=1 | 47 µs | 60 µs, 80 % | failed: no memory |",
        "",
        r"\* error above 5 % of the result.",
        "",
        "† called from Python, which is part of the time: a CUDA graph cannot hold it.",
    ]


def test_reports_hold_no_nan():
    assert benchmark.rounded(math.nan) is None
    assert benchmark.rounded(123456.0) == 123500.0


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_a_token_that_another_row_should_have_is_an_error(on_cpu, sampler):
    case = sampling.SamplingCase(sampler, rows=6, vocab=300)
    inputs = case.inputs(1, checked=True)
    bound = case.bind(inputs)
    bound.step(0)
    assert torch.allclose(bound.results()[0], torch.ones(6, dtype=torch.float64), atol=1e-5)
    shifted = inputs._replace(logits=inputs.logits.roll(1, 0))
    missed = torch.stack([case._miss(inputs, load("torch").sample(*shifted), i) for i in range(6)])
    assert missed.max() > 0.01
