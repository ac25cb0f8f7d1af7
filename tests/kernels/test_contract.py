"""Both implementations offer the same operations, and PyTorch's needs no Triton."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from leyden import kernels
from leyden.kernels.bundles import Ring, Rows, Weight
from leyden.kernels.delta.contract import DeltaInputs, DeltaRing, DeltaState, DeltaWeights
from operations import GROUPS, OPERATIONS

every_implementation = pytest.mark.parametrize("name", ["torch", "triton"])


@every_implementation
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_implementation_takes_the_arguments_of_the_contract(name, operation):
    group, _, function = operation.partition(".")
    contract = list(inspect.signature(getattr(GROUPS[group], function)).parameters)
    implementation = getattr(getattr(kernels.load(name), group), function)
    assert list(inspect.signature(implementation).parameters) == contract[1:]


def test_there_are_operations_to_compare():
    assert {operation.partition(".")[0] for operation in OPERATIONS} == set(GROUPS)
    assert "lightning.minimax" in OPERATIONS


def test_the_torch_implementation_never_imports_triton():
    code = "import sys; sys.modules['triton'] = None; import leyden.kernels as k; print(k.load('torch').dense.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "leyden.kernels.dense.reference", done.stderr


@every_implementation
def test_a_step_without_tokens_is_harmless(name, device):
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    ops = kernels.load(name)
    q, state, cache = zeros(0, 2, 16), zeros(3, 2, 16, 16), zeros(2, 16, 2, 16)
    none, start, table = (zeros(*shape, dtype=torch.int32) for shape in ((0,), (1,), (0, 4)))
    positions, slopes = zeros(0, dtype=torch.int64), zeros(2) + 1
    rows, ring = Rows(none, zeros(0, dtype=torch.bool), start, 0), Ring(zeros(3, 2, 16, 16), zeros(3, 2, 16, 16), none)
    for operation in (ops.lightning.minimax, ops.lightning.seg_la, ops.lightning.decode):
        assert operation(q, q, q, slopes, 1.0, state, rows, q).shape == q.shape
    for operation in (ops.lightning.replay, ops.lightning.verify):
        assert operation(q, q, q, slopes, 1.0, state, ring, rows, q).shape == q.shape
    ops.lightning.fold(slopes, state, ring, none)
    ops.lightning.snapshot(q, q, slopes, state, rows, none.view(0, 3), state)
    ops.attention.rope_and_store_kv(q, q, q, positions, zeros(4, 8), cache, cache, positions)
    ops.attention.rope_(q, q, positions, zeros(4, 8))
    assert ops.attention.prefill(q, cache, cache, table, rows, none, 1.0, q).shape == q.shape
    assert ops.attention.decode(q, cache, cache, table, rows, none, 1.0, q).shape == q.shape
    x, weight = zeros(0, 32), zeros(32)
    assert ops.dense.rms_norm(x, weight, 1e-5).shape == (0, 32)
    assert ops.dense.add_rms_norm(x, x, weight, 1e-5, 1.0, 1.0)[1].shape == (0, 32)
    assert ops.dense.gated_rms_norm(x, x, weight, 1e-5).shape == (0, 32)
    assert ops.dense.gate_(x[:, None], x[:, None]).shape == (0, 1, 32)
    assert ops.dense.join(x, zeros(1, 32), x, x, is_mixed=True).shape == (0, 32)
    assert ops.dense.silu_and_mul(x).shape == (0, 16)
    assert ops.experts.route(zeros(0, 4), 2)[1].shape == (0, 2)
    assert ops.experts.route_groups(zeros(0, 4), zeros(4), 2, 2, 1, 1.0)[1].shape == (0, 2)
    pairs = zeros(0, 2), zeros(0, 2, dtype=torch.int64)
    assert ops.experts.moe(x, Weight(zeros(4, 16, 32)), Weight(zeros(4, 32, 8)), *pairs).shape == (0, 32)


@every_implementation
def test_a_step_without_tokens_of_the_delta_rule_is_harmless(name, device):
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    ops, none = kernels.load(name).delta, zeros(0, dtype=torch.int32)
    inputs = DeltaInputs(zeros(0, 64), zeros(0, 2), zeros(0, 2))
    weights = DeltaWeights(zeros(4, 64), zeros(2), zeros(2))
    pool = DeltaState(zeros(3, 2, 16, 16), zeros(3, 4, 64))
    ring = DeltaRing(zeros(3, 1, 16, 16), zeros(3, 2, 16, 16), zeros(3, 2, 16), zeros(3, 1, 16, 64), none)
    rows, out = Rows(none, zeros(0, dtype=torch.bool), zeros(1, dtype=torch.int32), 0), zeros(0, 2, 16)
    assert ops.prefill(inputs, weights, pool, rows, none, none.view(0, 3), pool, out) is out
    assert ops.decode(inputs, weights, pool, rows, none, out) is out
    for operation in (ops.replay, ops.verify):
        assert operation(inputs, weights, pool, ring, rows, none, out) is out
    ops.fold(pool, ring, none, none)
