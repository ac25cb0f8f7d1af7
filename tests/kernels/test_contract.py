"""Both implementations offer the same operations, and PyTorch's needs no Triton."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from leyden import kernels
from leyden.kernels import torch_ops, triton_ops

OPERATIONS = [name for name, member in vars(kernels.Kernels).items() if inspect.isfunction(member) and name[0] != "_"]


@pytest.mark.parametrize("module", [torch_ops, triton_ops], ids=lambda m: m.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_implementation_takes_the_arguments_of_the_contract(module, name):
    contract = list(inspect.signature(getattr(kernels.Kernels, name)).parameters)
    assert list(inspect.signature(getattr(module, name)).parameters) == contract[1:]
    assert name in module.__all__


def test_there_are_operations_to_compare():
    assert "lightning_prefill" in OPERATIONS
    assert len(OPERATIONS) == len(torch_ops.__all__) == len(triton_ops.__all__)


def test_the_torch_implementation_never_imports_triton():
    code = "import sys; sys.modules['triton'] = None; import leyden.kernels as k; print(k.load('torch').__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "leyden.kernels.torch_ops", done.stderr
