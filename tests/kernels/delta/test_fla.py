"""The operations of fla-core behind `Delta.prefill` and `Delta.decode`: on a CPU with a stand-in for the package."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from delta_sequences import Sequences, bits
from fla_stand_in import stand_in
from leyden.kernels.delta import fla, reference
from leyden.kernels.delta.contract import DeltaState

CONTEXTS = (0, 2, 61)


def without_waiting(run):
    """The same operation, which fails if it waits for the GPU."""

    def watched(*given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


def operations(own: fla.Fla) -> SimpleNamespace:
    """`fold` is for the check of the sequences, whose rings are empty."""
    return SimpleNamespace(prefill=own.prefill, decode=own.decode, fold=reference.fold)


@pytest.fixture
def ops(device) -> SimpleNamespace:
    return operations(stand_in())


def test_prompts_and_decode_rows_follow_the_recurrence_beside_padding(ops, device, assert_close, poisoned_empty):
    rows = Sequences(ops, device, 90, CONTEXTS)
    rows.decode([0, 2])
    rows.prefill([3, 70], chosen=[0, 1])
    rows.decode()
    rows.prefill([2, 1, 5])
    rows.decode([1])
    rows.check(assert_close, 3e-6)


@pytest.mark.parametrize("snapshot_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_snapshots_are_what_the_slots_would_hold(ops, device, assert_close, snapshot_dtype):
    """Two rows with different numbers of places, one of them at a row's end, and one without; a padding place."""
    theirs, ours = (Sequences(each, device, 200, (0, 61, 2)) for each in (reference, ops))
    saved = []
    for rows in (theirs, ours):
        part = rows.pool.state.new_full((4, *rows.pool.state.shape[1:]), float("nan"), dtype=snapshot_dtype)
        saved.append(DeltaState(part, rows.pool.tail.new_full((4, *rows.pool.tail.shape[1:]), float("nan"))))
        rows.prefill([200, 67, 3], [(0, 64, 2), (0, 128, 0), (0, 192, -1), (1, 67, 1)], saved[-1])
        rows.check(assert_close, 3e-6)
    assert_close("snapshots", saved[1].state[:3], saved[0].state[:3].double(), 3e-6)
    assert torch.equal(saved[1].tail[:3, 1:], saved[0].tail[:3, 1:])  # place 0 is that of the token four before
    assert saved[1].state[3].isnan().all() and saved[1].tail[3].isnan().all()


def test_decode_of_padding_rows_alone_writes_nothing(ops, device):
    rows = Sequences(ops, device, 1, (5,))
    step = rows.next(0, 1)
    inputs = type(step)(*(x.expand(3, *x.shape[1:]) for x in step))
    slots = torch.full((3,), -1, dtype=torch.int32, device=device)
    out = inputs.raw.new_full((3, *rows.pool.state.shape[1:3]), float("nan"))
    ops.decode(inputs, rows.weights, rows.pool, rows.rows_of_one(slots), slots, out)
    assert out.count_nonzero() == 0
    for part, old in zip(rows.pool, rows.first, strict=True):
        assert torch.equal(bits(part), bits(old))


def test_half_precision_pools_are_written_in_their_dtype(ops, device, assert_close):
    rows = Sequences(ops, device, 30, CONTEXTS, dtype=torch.float16, state_dtype=torch.float16, K=32)
    rows.prefill([9, 20, 1])
    rows.decode()
    rows.check(assert_close, 2e-3)


def test_layers_of_a_step_share_one_plan_and_the_next_step_has_its_own(ops, device, monkeypatch):
    planned = []
    monkeypatch.setattr(fla, "_plan", lambda *given, plan=fla._plan: planned.append(given) or plan(*given))
    rows = Sequences(ops, device, 20, CONTEXTS)
    ops.prefill = lambda *given, run=ops.prefill: [run(*given) for _ in range(3)][-1]
    rows.prefill([4, 5, 6])
    rows.prefill([4, 5, 6])
    assert len(planned) == 2


@pytest.mark.parametrize(("version", "fault"), [(None, "fla"), ("0.5.1", "0.6 or later is needed"), ("0.6.0", None)])
def test_package_that_is_missing_or_too_old_is_told(version, fault, monkeypatch):
    package, rules = ModuleType("fla"), ModuleType("fla.ops.gated_delta_rule")
    rules.chunk_gated_delta_rule, rules.fused_recurrent_gated_delta_rule = max, min
    package.__version__ = version
    monkeypatch.setitem(sys.modules, "fla", package if version else None)
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", rules)
    if fault is None:
        assert isinstance(fla.load(), fla.Fla)
    else:
        with pytest.raises(ImportError, match=fault):
            fla.load()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla-core")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 5e-3)], ids=str)  # dots in tf32
def test_the_package_itself_follows_the_recurrence(device, assert_close, dtype, bound):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own, on import
        ops = operations(fla.load())
        rows = Sequences(ops, device, 300, (0, 2, 61, 64), K=64, V=64, dtype=dtype)
        saved = DeltaState(*(torch.full_like(part, float("nan")) for part in rows.pool))
        rows.prefill([3, 128, 70, 64], [(1, 62, 0), (2, 3, 1), (2, 67, 2), (3, 64, 3)], saved)
        rows.decode()
        ops.decode = without_waiting(ops.decode)
        rows.decode()
        rows.prefill(60)
        rows.check(assert_close, bound)
    assert saved.state[:4].isfinite().all()
