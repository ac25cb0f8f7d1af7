"""The benchmark of the prefix cache pairs prompts that part where none has parted, and ends in its figures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from tiny_models import FULL, LINEAR, save_minimax

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_prefix_cache", ROOT / "benchmarks" / "prefix_cache.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_the_second_of_a_pair_finds_most_of_what_it_shares_and_without_states_on_the_way_nothing(
    benchmark, monkeypatch, tmp_path, capsys
):
    save_minimax(tmp_path, heads=2, layer_types=(LINEAR, FULL), seed=0)
    arguments = ["--model", str(tmp_path), "--pairs", "3", "--system-tokens", "900", "--engine", "device=cpu"]
    monkeypatch.setattr("sys.argv", ["prefix_cache.py", *arguments])
    assert benchmark.main() == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["pairs"]) == 3
    assert 0.75 <= report["runs"]["on"]["smallest_found_share"] <= report["runs"]["on"]["found_share"] <= 1
    assert report["runs"]["off"]["found_share"] == 0
    assert report["runs"]["on"]["states_per_pair"] > report["runs"]["off"]["states_per_pair"] > 0
