"""The benchmark of sessions restores what it saved, and ends in its figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_sessions", ROOT / "benchmarks" / "sessions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_conversation_is_saved_and_restored_and_goes_on(benchmark, monkeypatch, tmp_path, capsys):
    arguments = ["--small", "--tokens", "200", "--rounds", "2", "--device", "cpu", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["sessions.py", *arguments])
    assert benchmark.main() == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["same_answer"] and report["next_turn_cached_tokens"] == 200 + benchmark.ANSWER_TOKENS - 1
    assert len(report["restore_s"]) == 2 and report["gb"] > 0
    assert list(tmp_path.iterdir()) == []
