"""The engine's benchmark on a tiny model, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_models import FULL, LINEAR, save_minimax

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_serving", ROOT / "benchmarks" / "serving.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(benchmark, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["serving.py", *arguments])
    return benchmark.main()


def test_offline_measures_every_case_and_ends_in_json(benchmark, monkeypatch, tmp_path, capsys):
    save_minimax(tmp_path, layer_types=(LINEAR, FULL))
    engine = ("linear_backend=replay", "cpu_memory_gb=0.1", "max_num_batched_tokens=16", "device=cpu")
    cases = ("1x5x3", "4x9x2")
    assert run(benchmark, monkeypatch, "offline", "--model", str(tmp_path), "--cases", *cases, "--engine", *engine) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["linear_backend"] == "replay"
    assert [(c["requests"], c["prompt"], c["answer"]) for c in report["cases"]] == [(1, 5, 3), (4, 9, 2)]
    for case in report["cases"]:
        assert case["answer_tokens_per_s"] == pytest.approx(
            case["requests"] * case["answer"] / case["seconds"], rel=0.01
        )


@pytest.mark.parametrize("case", ["0x1x1", "8x8", "8 x 8 x 8", "1x-2x3"])
def test_a_malformed_case_is_refused(benchmark, monkeypatch, capsys, case):
    with pytest.raises(SystemExit):
        run(benchmark, monkeypatch, "offline", "--cases", case)
    assert "REQUESTSxPROMPTxANSWER" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "parameters", "state"), [("dense", "7.108B", "58.7 MB"), ("moe", "13.89B", "22 MB")])
def test_the_configurations_to_measure_are_what_they_say(name, parameters, state):
    from leyden.configs.schema import EngineConfig
    from leyden.server.describe import describe_model

    told = describe_model(EngineConfig(model=str(ROOT / "benchmarks" / "configs" / name), device="cpu"), None)
    assert f"parameters         {parameters} " in told
    assert f"state per sequence {state} in float32" in told
