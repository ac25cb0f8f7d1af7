"""The tables of README and docs are made from the recorded runs, not typed in."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from leyden.benchmarks.step_table import Step, floors

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
REFERENCE = json.loads((RESULTS / "vllm-0.23-h200.json").read_text())


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("benchmarks_tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def offline_report(state_dtype: str = "float32", **values: float) -> dict:
    sizes = [tuple(map(int, label.split("x"))) for label in REFERENCE["dense"]]
    cases = [
        {"requests": r, "prompt": p, "answer": a, "ms_per_step": 5.25, "answer_tokens_per_s": 6000.4, **values}
        for r, p, a in [(3, 3, 3), *sizes]
    ]
    return {
        "hardware": "a GPU",
        "software": {"torch": "2", "triton": "3"},
        "state_dtype": state_dtype,
        "linear_backend": "replay",
        "cases": [case | {"prompt_tokens_per_s": 70000.0} for case in cases],
    }


def http_report() -> dict:
    times = {"mean": 0.02, "p50": 0.0123, "p95": 0.03, "p99": 0.25, "max": 0.4}
    case = {"name": "8 streams", "ttft_s": times, "itl_s": times, "output_tokens_per_s": 1234.5, "requests": 9}
    told = {"model": "m", "hardware": "a GPU", "start_to_ready_s": None, "prompt_tokens": "128", "max_tokens": "64"}
    return told | {"cases": [case | {"errors": {}}, case | {"name": "64 streams", "errors": {"timeout": 2}}]}


def test_every_page_shows_what_was_recorded():
    command = [sys.executable, "-P", "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_each_offline_case_is_shown_by_the_measure_that_the_reference_has(tables):
    text = tables.offline_table(REFERENCE, offline_report(), offline_report(ms_per_step=3.0))
    assert "| dense | 1 x 128 x 256 | ms per step | 5.2 | 5.9 |" in text
    assert "| dense | 64 x 1024 x 256 | answer tokens/s | 6,000 | 3,126 |" in text
    assert "| moe | 64 x 4096 x 1 | prompt tokens/s | 70,000 | 85,635 |" in text
    assert "| moe | 1 x 128 x 256 | ms per step | 3.0 | 3.0 |" in text
    assert "3 x 3 x 3" not in text, "nothing to compare with"


def test_every_column_of_the_comparison_says_the_dtype_of_its_state(tables):
    half = offline_report("bfloat16", ms_per_step=4.0)
    text = tables.offline_table(REFERENCE, offline_report(), offline_report(), half, half)
    assert "| leyden, float32 | leyden, bfloat16 | vLLM 0.23.0, bfloat16 |" in text
    assert "| dense | 1 x 128 x 256 | ms per step | 5.2 | 4.0 | 5.9 |" in text


def test_a_served_case_is_a_row_and_its_failures_are_told(tables):
    text = tables.serving_table(http_report())
    assert "| 8 streams | 12.3 ms | 250 ms | 12.3 ms | 250 ms | 1,234 |" in text
    assert "| 64 streams (2 of 9 requests failed) |" in text
    assert "start to ready" not in text


def test_what_the_prefix_cache_spares_is_shown_by_turn(tables):
    def run(*medians: float, share: float) -> dict:
        turns = {f"turn {i}": {"median": median, "p99": 1.0} for i, median in enumerate(medians, 1)}
        return {"first_token_ms": turns, "cached_share": share, "share_in_blocks_of": {"512": 0.9}}

    told = {"model": "m", "hardware": "a GPU", "software": {}, "conversations": 4, "turns": 2, "users": 3, "systems": 5}
    told |= {"system_tokens": 8192, "message_tokens": 64, "answer_tokens": 32}
    text = tables.prefix_cache_table(told | {"runs": {"on": run(100, 8, share=0.987), "off": run(200, 192, share=0)}})
    assert "98.7%" in text and "90% in blocks of 512" in text and "8,192 tokens" in text
    assert "| 2 | 192.0 ms | 8.0 ms | 24.0x |" in text


def test_what_drafts_bring_is_shown_by_model_and_task(tables):
    def task(off: float, on: float, share: float | None) -> dict:
        return {
            "off": {"tokens_per_s": off},
            "on": {"tokens_per_s": on, "tokens_per_step": 3.21, "accepted_share": share},
        }

    report = {"hardware": "a GPU", "software": {}, "speculative_tokens": 7}
    tasks = {"edit": task(100, 250, 0.8), "random": task(100, 99, None)}
    named = [report | {"model": f"configs/{name}", "tasks": each} for name, each in (("dense", tasks), ("moe", {}))]
    text = tables.prompt_lookup_table(*named)
    assert "| dense | edit | 100 tokens/s | 250 tokens/s | 2.50x | 3.21 | 80% |" in text
    assert "| dense | random | 100 tokens/s | 99 tokens/s | 0.99x | 3.21 | none were made |" in text


def test_formats_of_weights_are_columns_of_the_same_cases(tables):
    def run(name: str, ms: float, weights: int) -> dict:
        case = {"requests": 1, "prompt": 128, "answer": 64, "ms_per_step": ms}
        named = {"model": "configs/dense", "hardware": "a GPU", "software": {}, "engine": {"quantization": name}}
        return named | {"memory_bytes": {"weights": weights}, "cases": [case]}

    text = tables.formats_table(run("fp8", 3.99, 11 * 10**9), run("int4", 3.5, 77 * 10**8))
    assert "| requests x prompt x answer | fp8 | int4 |" in text and "| weights | 11.0 GB | 7.7 GB |" in text
    assert "| 1 x 128 x 64 | 4.0 ms per step | 3.5 ms per step |" in text


def test_a_session_is_shown_beside_computing_it(tables):
    told = {"device": "a GPU", "tokens": 100_000, "gb": 1.7, "compute_s": 30.0, "save_s": 1.0, "restore_cold_s": 0.9}
    text = tables.sessions_table(told | {"restore_s": [0.4, 0.5, 0.6]})
    assert "| 30.0 s | 1.00 s | 0.90 s | 0.50 s | 60x |" in text and "100,000 tokens" in text


def test_each_kind_of_reuse_has_a_row_with_its_factor(tables):
    def runs(measure: str, off: float, on: float) -> dict:
        return {"off": {measure: off}, "on": {measure: on}}

    turns = {run: {"first_token_ms": {"turn 2": {"median": ms}}} for run, ms in (("off", 90.0), ("on", 30.0))}
    text = tables.spared_table(
        {"system_tokens": 8192, "runs": turns},
        {"prompt_tokens": 4096, "runs": runs("second_ms", 50.0, 40.0)},
        {"tasks": {"edit": runs("tokens_per_s", 100.0, 250.0)}},
        {"device": "a GPU", "tokens": 1000, "compute_s": 3.0, "restore_s": [0.4, 0.5, 0.9]},
    )
    for row in ("| 90 ms | 30 ms | 3.0x |", "| 50 ms | 40 ms | 1.2x |", "| 100 tokens/s | 250 tokens/s | 2.5x |"):
        assert row in text
    assert "1,000 tokens" in text and "| 3.00 s | 0.50 s | 6.0x |" in text


def test_gaps_are_shown_by_case_and_whether_the_goal_is_met(tables):
    case = {"case": "nothing", "health_ms": 1.2, "stream_ms": 60.4, "short_chat_ms": 9.0}
    text = tables.stalls_table({"hardware": "a machine", "goal_ms": 50.0, "is_met": False, "cases": [case]})
    assert "| nothing | 1 ms | 60 ms | 9 ms |" in text and "at most 50 ms: missed" in text


def test_a_table_has_a_place_if_and_only_if_its_run_is_recorded(tables, tmp_path):
    names = ("serving-cpu", "api-process-cpu")
    for name in names:
        (tmp_path / f"{name}.json").write_text((RESULTS / f"{name}.json").read_text())
    text = "".join(f"<!-- {name} -->\nyesterday\n<!-- /{name} -->\n" for name in names)
    page = "docs/performance.md"
    assert "yesterday" not in tables.render(page, text, tmp_path)
    with pytest.raises(SystemExit, match=r"serving-http-h200, which is not recorded"):
        tables.render(page, text + "<!-- serving-http-h200 -->\n<!-- /serving-http-h200 -->", tmp_path)
    (tmp_path / "serving-http-h200.json").write_text(json.dumps(http_report()))
    with pytest.raises(SystemExit, match="no place for it: <!-- serving-http-h200 -->"):
        tables.render(page, text, tmp_path)


CONFIG = json.loads((ROOT / "benchmarks" / "configs" / "dense" / "config.json").read_text())
KERNELS = {"copy_tb_per_s": 3.0, "matrix_tflop_per_s": 700.0}


def profile(name: str, **operations: float) -> dict:
    times = [{"name": operation, "calls": 1.0, "us": us} for operation, us in operations.items()]
    return {"name": name, "steps": 16, "wall_us": 9000.0, "device_us": 8000.0, "operations": times}


def test_a_step_is_shown_by_kind_beside_its_floor(tables):
    steps = [
        profile("prefill, 8192 tokens of 2 prompts", nvjet_x=150000.0, _segment_kernel=4000.0),
        profile("decode, 1 rows after 128", _row_kernel=4000.0, nvjet_y=1000.0, _replay_kernel=100.0, what_else=7.0),
    ]
    lines = tables.steps_table(steps, CONFIG, KERNELS).splitlines()
    assert lines[0] == "| ms per step | decode, 1 rows after 128 | prefill, 8192 tokens of 2 prompts |"
    weights = 2 * (7.108e9 - 32000 * 4096) / 3e12 * 1e3  # all but the embedding, once
    products = next(line for line in lines if line.startswith("| matrix products"))
    assert products.startswith(f"| matrix products | 5.00 ({weights:.2f}) | 150.00 (160.")
    assert "| sampling, copies, the rest | 0.01 | 0.00 |" in lines
    assert not any(line.startswith("| experts") for line in lines), "a model without experts has no such row"


def test_floors_of_a_family_follow_from_its_spec():
    """Ring-mini, one token: the matrices and its eight experts once; states read once and written per ring."""
    config = json.loads((ROOT / "benchmarks" / "configs" / "ring-mini" / "config.json").read_text())
    least = floors(config, Step(tokens=1, rows=1, context=1000.0, is_prefill=False), 1.0, 1e30)
    attention = 2048 * (16 * 5 * 2048 + 4 * (2 * 2048 + 2 * 512))
    mlps = 3 * 2048 * (5120 + 19 * 512)
    assert least["matrix products"] == pytest.approx(1e6 * 2 * (attention + mlps + 157184 * 2048))
    assert least["experts"] == pytest.approx(1e6 * 19 * 8 * 2 * 3 * 2048 * 512)
    assert least["linear attention"] == pytest.approx(1e6 * 16 * (2**20 * (1 + 2 / 16) + 38 * 2048))
    assert least["softmax attention"] == pytest.approx(1e6 * 4 * 2 * 2 * 512 * 1000)


def test_floors_of_gated_delta_nets_follow_from_their_specs():
    """Qwen3.5-9B, one token: 24 gated delta nets of 16 and 32 heads, and 8 softmax layers with gates."""
    config = json.loads((ROOT / "benchmarks" / "configs" / "qwen3.5-9b" / "config.json").read_text())
    least = floors(config, Step(tokens=1, rows=1, context=1000.0, is_prefill=False), 1.0, 1e30)
    mixers = 24 * 4096 * (2 * 2048 + 3 * 4096 + 2 * 32) + 8 * 4096 * (3 * 16 + 2 * 4) * 256
    mlps = 32 * 3 * 4096 * 12288
    assert least["matrix products"] == pytest.approx(1e6 * 2 * (mixers + mlps + 248320 * 4096))
    ring = 8 * (2 * 2048 + 4 * 4096)
    assert least["linear attention"] == pytest.approx(1e6 * 24 * (4 * 4096 * 128 * (1 + 2 / 16) + ring + 2 * 12288))
    assert least["softmax attention"] == pytest.approx(1e6 * 8 * 2 * 2 * 4 * 256 * 1000)


def test_a_profile_of_something_else_is_refused(tables):
    with pytest.raises(SystemExit, match="no profiled step"):
        tables.steps_table([profile("training")], CONFIG, KERNELS)


@pytest.mark.parametrize("script", ["raw_streams", "stalls", "step_table", "tables"])
def test_a_script_says_what_it_is_and_what_it_takes(script):
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"usage: {script}.py" in done.stdout
