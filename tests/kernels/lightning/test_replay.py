"""Deferred-write decode against the token recurrence in float64, from every place of the ring."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from leyden.kernels import load
from leyden.kernels.bundles import Ring, Rows
from leyden.kernels.lightning.reference import recurrence
from torch import Tensor

ON_GPU = torch.cuda.is_available()
KERNELS = {name: load(name).lightning for name in ("torch", "triton")}
RING = 16
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}

every_kernel = pytest.mark.parametrize("backend", KERNELS)


@dataclass
class Decoding:
    """Rows that decode side by side: `steps` tokens each, in a permuted pool with spare slots."""

    q: Tensor  # [B, steps, H, K]
    k: Tensor
    v: Tensor  # [B, steps, H, V]
    slopes: Tensor
    scale: float
    state: Tensor
    key_ring: Tensor
    value_ring: Tensor
    slots: Tensor
    continues: Tensor  # of the first step
    pending: Tensor

    @property
    def ring(self) -> Ring:
        return Ring(self.key_ring, self.value_ring, self.pending)

    def step(self, backend: str, t: int) -> Tensor:
        """Outputs [B, H, V] of step t; counts waiting tokens as the contract says."""
        out = torch.full_like(self.v[:, t], float("nan"))
        continues = self.continues | (t > 0)
        rows = Rows(self.slots, continues, torch.arange(len(out) + 1, device=out.device).int(), 1)
        inputs = (self.q[:, t], self.k[:, t], self.v[:, t], self.slopes, self.scale)
        KERNELS[backend].replay(*inputs, self.state, self.ring, rows, out)
        self.pending = torch.where(continues, (self.pending + 1) % RING, 0).int()
        return out

    def run(self, backend: str) -> Tensor:
        return torch.stack([self.step(backend, t) for t in range(self.q.shape[1])], dim=1)

    def fold(self, backend: str) -> None:
        KERNELS[backend].fold(self.slopes, self.state, self.ring, self.slots)
        self.pending = torch.zeros_like(self.pending)

    def oracle(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, steps, H, V] and final states [B, H, K, V] from the pool as it was, in float64."""
        rows, steps = self.q.shape[:2]
        whole = Rows(self.slots, self.continues, torch.arange(rows + 1) * steps, steps)
        flat = [x.flatten(0, 1) for x in (self.q, self.k, self.v)]
        out, final = recurrence(*flat, self.slopes, self.scale, state, whole)
        return out.unflatten(0, (rows, steps)), final

    @property
    def own_states(self) -> Tensor:
        return self.state[self.slots.long()]


def make_decoding(
    device: torch.device,
    steps: int,
    *,
    rows: int = 2,
    heads: int = 2,
    K: int = 16,
    V: int = 16,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    slopes: list[float] | None = None,
) -> Decoding:
    generator = torch.Generator().manual_seed(steps)
    q, k, v = torch.randn(rows, steps, heads, 2 * K + V, generator=generator).to(device, dtype).split([K, K, V], -1)
    state = torch.randn(rows + 2, heads, K, V, generator=generator).to(device, state_dtype)
    slopes = slopes or [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]
    return Decoding(
        q, k, v,
        torch.tensor(slopes, device=device),
        K**-0.5,
        state,
        torch.full((rows + 2, heads, RING, K), float("nan"), dtype=dtype, device=device),
        torch.full((rows + 2, heads, RING, V), float("nan"), dtype=dtype, device=device),
        torch.randperm(rows + 2, generator=generator)[:rows].to(device, torch.int32),
        torch.ones(rows, dtype=torch.bool, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )  # fmt: skip


@every_kernel
@pytest.mark.parametrize("steps", [1, 15, 16, 17, 37])
def test_steps_follow_the_recurrence_through_several_cycles(backend, steps, device, assert_close):
    case = make_decoding(device, steps)
    expected, final = case.oracle(case.state.clone())
    assert_close("out", case.run(backend), expected, 1e-6)
    case.fold(backend)
    assert_close("state", case.own_states, final, 1e-6)


@every_kernel
@pytest.mark.parametrize(("K", "V"), [(64, 64), (96, 96), (128, 128), (256, 256), (32, 80), (96, 16)])
def test_any_head_dim(backend, K, V, device, assert_close):
    case = make_decoding(device, 18, rows=1, heads=3 if ON_GPU else 1, K=K, V=V)
    expected, final = case.oracle(case.state.clone())
    assert_close("out", case.run(backend), expected, 1e-6)
    case.fold(backend)
    assert_close("state", case.own_states, final, 1e-6)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tokens_lose_nothing_in_the_ring(backend, dtype, device, assert_close):
    case = make_decoding(device, 20, dtype=dtype, K=64)
    expected, final = case.oracle(case.state.clone())
    assert_close("out", case.run(backend), expected, BOUNDS[dtype])
    case.fold(backend)
    assert_close("state", case.own_states, final, 1e-6)


@every_kernel
def test_the_state_is_written_when_the_ring_is_full_and_not_before(backend, device):
    case = make_decoding(device, RING)
    before = case.state.clone()
    for t in range(RING - 1):
        case.step(backend, t)
        assert torch.equal(case.state, before), f"written at step {t}"
    case.step(backend, RING - 1)
    assert not torch.equal(case.own_states, before[case.slots.long()])


@every_kernel
def test_a_half_precision_state_is_rounded_once_per_cycle(backend, device, assert_close):
    case = make_decoding(device, RING - 1, state_dtype=torch.bfloat16)
    expected, final = case.oracle(case.state.clone())
    assert_close("out", case.run(backend), expected, 1e-6)  # exact: the pool's values have not been rounded again
    case.fold(backend)
    assert_close("state", case.own_states, final, 4e-3)


@every_kernel
def test_rows_may_be_at_different_places_of_their_rings(backend, device, assert_close):
    case = make_decoding(device, 24, rows=3)
    expected, _ = case.oracle(case.state.clone())
    late = torch.tensor([0, 5, 11], device=device)  # row r starts late[r] steps after the first
    outs = torch.zeros_like(case.v)
    for t in range(24 + 11):
        active = [r for r in range(3) if 0 <= t - late[r] < 24]
        part = Decoding(
            torch.stack([case.q[r, t - late[r]] for r in active])[:, None],
            torch.stack([case.k[r, t - late[r]] for r in active])[:, None],
            torch.stack([case.v[r, t - late[r]] for r in active])[:, None],
            case.slopes, case.scale, case.state, case.key_ring, case.value_ring,
            case.slots[active], case.continues[active], case.pending[active],
        )  # fmt: skip
        out = part.step(backend, 0)
        for i, r in enumerate(active):
            outs[r, t - late[r]] = out[i]
        case.pending[active] = part.pending
    assert_close("out", outs, expected, 1e-6)


@every_kernel
def test_a_fold_in_mid_ring_is_a_snapshot_to_go_on_from(backend, device, assert_close):
    case = make_decoding(device, 30)
    expected, final = case.oracle(case.state.clone())
    outs = []
    for t in range(30):
        outs.append(case.step(backend, t))
        if t in (4, 5, 20):
            case.fold(backend)
            case.key_ring.fill_(float("nan"))  # nothing that waited is needed any more
            case.value_ring.fill_(float("nan"))
    assert_close("out", torch.stack(outs, 1), expected, 1e-6)
    case.fold(backend)
    assert_close("state", case.own_states, final, 1e-6)


@every_kernel
def test_a_new_row_reads_nothing_of_the_previous_owner(backend, device, assert_close):
    case = make_decoding(device, 3)
    case.continues[:] = False
    case.pending[:] = 7  # of the slot's previous owner
    case.state.fill_(float("nan"))
    expected, final = case.oracle(case.state)
    assert_close("out", case.run(backend), expected, 1e-6)
    case.fold(backend)
    assert_close("state", case.own_states, final, 1e-6)


@every_kernel
def test_padding_rows_write_zeros_and_other_slots_keep_every_bit(backend, device):
    case = make_decoding(device, RING, rows=3)
    case.slots[1] = -1
    used = {int(slot) for slot in case.slots if slot >= 0}
    pools = (case.state, case.key_ring, case.value_ring)
    before = [pool.clone() for pool in pools]
    for t in range(RING):
        assert case.step(backend, t)[1].count_nonzero() == 0
    case.pending[:] = 3
    case.fold(backend)
    for pool, old in zip(pools, before, strict=True):
        for slot in set(range(len(pool))) - used:
            assert torch.equal(pool[slot].view(torch.int32), old[slot].view(torch.int32)), f"slot {slot}"


@every_kernel
def test_many_steps_do_not_drift(backend, device, assert_close):
    steps = 4096 if ON_GPU else 512 if backend == "torch" else 70
    case = make_decoding(device, steps, rows=1, heads=1, slopes=[0.004])
    expected, final = case.oracle(case.state.clone())
    assert_close("out", case.run(backend), expected, 1e-5)
    case.fold(backend)
    assert_close("state", case.own_states, final, 1e-5)


@pytest.mark.gpu
def test_a_captured_step_serves_every_place_in_the_ring(device, assert_close):
    case = make_decoding(device, 2 * RING + 3, heads=4, K=64, V=64, dtype=torch.bfloat16)
    expected, _ = case.oracle(case.state.clone())
    q, k, v = (x[:, 0].clone() for x in (case.q, case.k, case.v))
    out = torch.empty_like(v)
    arguments = (q, k, v, case.slopes, case.scale, case.state, case.ring)
    rows = Rows(case.slots, case.continues, torch.arange(len(q) + 1, device=device).int(), 1)
    graph = torch.cuda.CUDAGraph()
    padding = rows._replace(slots=torch.full_like(case.slots, -1))
    KERNELS["triton"].replay(*arguments, padding, out)  # compiles
    with torch.cuda.graph(graph):
        KERNELS["triton"].replay(*arguments, rows, out)
    outs = []
    for t in range(case.q.shape[1]):
        for buffer, x in ((q, case.q), (k, case.k), (v, case.v)):
            buffer.copy_(x[:, t])
        graph.replay()
        outs.append(out.clone())
        case.pending.copy_((case.pending + 1) % RING)
    assert_close("out", torch.stack(outs, 1), expected, 5e-3)


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31_elements_are_addressed(device, assert_close):
    case = make_decoding(device, RING + 2, rows=1, heads=64, K=128, V=128, state_dtype=torch.bfloat16)
    expected, final = case.oracle(case.state.clone())
    slot, home = 2099, int(case.slots[0])
    pools = []
    for pool in (case.state, case.key_ring, case.value_ring):
        wide = torch.zeros(2100, *pool.shape[1:], dtype=pool.dtype, device=device)
        wide[slot] = pool[home]
        pools.append(wide)
    assert pools[0][:slot].numel() > 2**31
    case.state, case.key_ring, case.value_ring = pools
    case.slots = torch.tensor([slot], dtype=torch.int32, device=device)
    assert_close("out", case.run("triton"), expected, 4e-3)
    case.fold("triton")
    assert_close("state", case.own_states, final, 4e-3)
    assert not any(pool[:slot].any() for pool in pools)
