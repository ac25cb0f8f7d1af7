"""The API process's benchmark, small: every stream gets all of its tokens, whoever is faster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs_and_ends_in_json():
    sizes = ["--streams", "8", "--rounds", "2", "--max-tokens", "16", "--step-ms", "0", "--route", "chat/completions"]
    command = [sys.executable, "-P", "benchmarks/api_process.py", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    [case] = report["cases"]
    assert 0 < case["chunks_per_s"] <= case["tokens_per_s"] * 18 / 16, "a chat has a role and a reason more"
    assert case["cpu_us_per_token"] > 0
