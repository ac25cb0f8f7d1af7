"""No kernel reads or writes beyond its tensors, not even values that it ignores: on a GPU that may be no memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operations import OPERATIONS

SCRIPT = Path(__file__).with_name("guarded.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter; on a GPU compute-sanitizer sees more")
@pytest.mark.parametrize("side", ["before", "behind"])
def test_every_operation_stays_within_its_tensors(side):
    done = subprocess.run([sys.executable, SCRIPT, side], capture_output=True, text=True, check=False)
    came_through = done.stdout.splitlines()
    assert done.returncode == 0, f"the operation after {came_through[-1:]} left a tensor: {done.stderr[-500:]}"
    assert {name.partition(" of ")[0] for name in came_through} == {*OPERATIONS, "sample"}
