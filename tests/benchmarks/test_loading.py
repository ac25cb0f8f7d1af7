"""The benchmark of loading writes a checkpoint that loads, and ends in its figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_models import FULL, LINEAR, save_minimax

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_loading", ROOT / "benchmarks" / "loading.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_checkpoint_is_written_in_shards_once_and_loaded_every_round(benchmark, monkeypatch, tmp_path, capsys):
    config, folder = tmp_path / "config", tmp_path / "checkpoint"
    save_minimax(config, layer_types=(LINEAR, FULL))
    arguments = ["--config", str(config), "--folder", str(folder), "--shard-gb", "0.0001", "--device", "cpu"]
    written = []
    for rounds in (2, 1):
        monkeypatch.setattr("sys.argv", ["loading.py", *arguments, "--rounds", str(rounds)])
        assert benchmark.main() == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(report["gb_per_s"]) == rounds and report["host_growth_mb"] >= 0
        written.append({path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")})
    assert len(written[0]) > 2
    assert written[0] == written[1]
