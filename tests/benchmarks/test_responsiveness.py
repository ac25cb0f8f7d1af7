"""The benchmark of an engine that computes a long prompt ends in its figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    path = ROOT / "benchmarks" / "responsiveness.py"
    spec = importlib.util.spec_from_file_location("benchmarks_responsiveness", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_short_prompt_and_an_abort_are_read_while_a_long_prompt_is_computed(benchmark, monkeypatch, capsys):
    arguments = ["--small", "--tokens", "60000", "--short-after", "0.001", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["responsiveness.py", *arguments])
    assert benchmark.main() == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["tokens"] == 60_000 and not report["long_was_complete"]
    assert report["long_chunks_before_it"] <= 3
    assert report["steps_of_the_long_prompt_after_its_abort"] <= 2
    assert report["short_first_token_s"] > 0
