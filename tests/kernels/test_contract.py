"""Both implementations offer the same operations, and PyTorch's needs no Triton."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
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


@pytest.mark.parametrize("ops", [torch_ops, triton_ops], ids=["torch", "triton"])
def test_a_step_without_tokens_is_harmless(ops, device):
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    q, state, cache = zeros(0, 2, 16), zeros(3, 2, 16, 16), zeros(2, 16, 2, 16)
    none, start, table = (zeros(*shape, dtype=torch.int32) for shape in ((0,), (1,), (0, 4)))
    new, positions, slopes = zeros(0, dtype=torch.bool), zeros(0, dtype=torch.int64), zeros(2) + 1
    assert ops.lightning_prefill(q, q, q, slopes, 1.0, state, none, new, start, 0, q).shape == q.shape
    assert ops.lightning_segments(q, q, q, slopes, 1.0, state, none, new, start, 0, q).shape == q.shape
    assert ops.lightning_decode(q, q, q, slopes, 1.0, state, none, new, q).shape == q.shape
    ring = zeros(3, 2, 16, 16)
    assert ops.lightning_replay(q, q, q, slopes, 1.0, state, ring, ring, none, new, none, q).shape == q.shape
    assert ops.lightning_verify(q, q, q, slopes, 1.0, state, ring, ring, none, new, none, start, q).shape == q.shape
    ops.lightning_fold(slopes, state, ring, ring, none, new, none)
    ops.lightning_snapshot(q, q, slopes, state, none, new, start, none.view(0, 3), state)
    ops.rope_and_store_kv(q, q, q, positions, zeros(4, 8), cache, cache, positions)
    assert ops.attention_prefill(q, cache, cache, table, none, start, none, 0, 1.0, q).shape == q.shape
    assert ops.attention_decode(q, cache, cache, table, none, none, 1.0, q).shape == q.shape
    x, weight = zeros(0, 32), zeros(32)
    assert ops.rms_norm(x, weight, 1e-5).shape == (0, 32)
    assert ops.add_rms_norm(x, x, weight, 1e-5, 1.0, 1.0)[1].shape == (0, 32)
    assert ops.gated_rms_norm(x, x, weight, 1e-5).shape == (0, 32)
    assert ops.route(zeros(0, 4), 2)[1].shape == (0, 2)
    assert ops.silu_and_mul(x).shape == (0, 16)
    pairs = zeros(0, 2), zeros(0, 2, dtype=torch.int64)
    assert ops.moe(x, zeros(4, 16, 32), zeros(4, 32, 8), *pairs).shape == (0, 32)
