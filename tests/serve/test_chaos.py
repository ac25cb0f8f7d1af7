"""`tests/chaos.py`, for a third of a minute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_law_is_broken_in_a_little_chaos():
    script = Path(__file__).parents[1] / "chaos.py"
    done = subprocess.run([sys.executable, "-P", str(script), "--minutes", "0.33"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engines killed" in done.stdout
