"""Rows of drafts against the token recurrence in float64, and steps that go on from the kept tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

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
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

every_kernel = pytest.mark.parametrize("backend", KERNELS)


@dataclass
class Case:
    """Verify rows: views of one interleaved projection, a permuted pool with spare slots. What may not be read is
    NaN: ring places where no token waits, and the slots of rows without an initial state."""

    q: Tensor  # [T, H, K]
    k: Tensor
    v: Tensor  # [T, H, V]
    slopes: Tensor
    scale: float
    state: Tensor
    key_ring: Tensor
    value_ring: Tensor
    slots: Tensor
    continues: Tensor
    pending: Tensor
    starts: Tensor
    out: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.out = torch.full_like(self.v, float("nan"))

    @property
    def pools(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.state, self.key_ring, self.value_ring

    @property
    def ring(self) -> Ring:
        return Ring(self.key_ring, self.value_ring, self.pending)

    def run(self, backend: str) -> Tensor:
        """The outputs; the pools are changed in place."""
        rows = Rows(self.slots, self.continues, self.starts, RING)
        inputs = (self.q, self.k, self.v, self.slopes, self.scale)
        returned = KERNELS[backend].verify(*inputs, self.state, self.ring, rows, self.out)
        assert returned is self.out
        return self.out

    def oracle(self) -> Tensor:
        """[T, H, V]: waiting tokens and new ones through the recurrence, of which the new ones are returned."""
        out = torch.zeros(self.v.shape, dtype=torch.float64)
        for row, slot in enumerate(self.slots.tolist()):
            tokens = slice(*self.starts[row : row + 2].tolist())
            p = int(self.pending[row]) if self.continues[row] else 0
            keys, values = (ring[slot, :, :p].transpose(0, 1).double() for ring in (self.key_ring, self.value_ring))
            k, v = torch.cat([keys, self.k[tokens].double()]), torch.cat([values, self.v[tokens].double()])
            q = torch.cat([torch.zeros_like(keys), self.q[tokens].double()])
            one = slice(row, row + 1)
            whole = Rows(self.slots[one], self.continues[one], torch.tensor([0, len(q)]), len(q))
            out[tokens] = recurrence(q, k, v, self.slopes, self.scale, self.state, whole)[0][p:].cpu()
        return out


def make_case(
    device: torch.device,
    lengths: list[int],
    pending: list[int],
    *,
    continues: list[bool] | None = None,
    heads: int = 2,
    K: int = 16,
    V: int | None = None,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    ring: int = RING,
) -> Case:
    generator = torch.Generator().manual_seed(sum(lengths) + 100 * sum(pending))
    V = K if V is None else V
    rows = len(lengths)
    continues = continues or [True] * rows
    q, k, v = torch.randn(sum(lengths), heads, 2 * K + V, generator=generator).to(device, dtype).split([K, K, V], -1)
    slots = torch.randperm(rows + 2, generator=generator)[:rows].tolist()
    state = torch.randn(rows + 2, heads, K, V, generator=generator)
    rings = [torch.full((rows + 2, heads, ring, dim), float("nan")) for dim in (K, V)]
    for slot, p, continuing in zip(slots, pending, continues, strict=True):
        if continuing:
            for x in rings:
                x[slot, :, :p] = torch.randn(heads, p, x.shape[3], generator=generator)
        else:
            state[slot] = float("nan")
    return Case(
        q, k, v,
        torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)], device=device),
        K**-0.5,
        state.to(device, state_dtype),
        *(x.to(device, dtype) for x in rings),
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(continues, device=device),
        torch.tensor(pending, dtype=torch.int32, device=device),
        torch.tensor([0, *lengths], device=device).cumsum(0).int(),
    )  # fmt: skip


def skip_without_dot(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter has no bfloat16 dot")


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.dtype])


@every_kernel
@pytest.mark.parametrize("pending", range(RING))
def test_rows_follow_the_recurrence_from_any_place_of_the_ring(backend, pending, device, assert_close):
    room = RING - pending
    case = make_case(device, [room, 1, (room + 1) // 2], [pending, pending, pending // 2])
    expected = case.oracle()
    assert_close("out", case.run(backend), expected, 1e-6)


@every_kernel
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("K", "V"), [(16, 16), (64, 64), (96, 96), (128, 128), (256, 256), (32, 80), (96, 16)])
def test_any_head_dim_and_dtype(backend, K, V, dtype, device, assert_close):
    skip_without_dot(backend, dtype)
    case = make_case(device, [5, 8], [9, 3], heads=3 if ON_GPU else 1, K=K, V=V, dtype=dtype)
    expected = case.oracle()
    assert_close("out", case.run(backend), expected, BOUNDS[dtype])


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_state(backend, dtype, device, assert_close):
    case = make_case(device, [5, 8], [9, 3], state_dtype=dtype)
    expected = case.oracle()
    assert_close("out", case.run(backend), expected, 1e-6)


@every_kernel
@pytest.mark.parametrize("ring", [4, 32])
def test_any_size_of_ring(backend, ring, device, assert_close):
    case = make_case(device, [1, ring - 1, ring], [ring - 1, 1, 0], ring=ring)
    expected = case.oracle()
    assert_close("out", case.run(backend), expected, 1e-6)


@every_kernel
def test_a_row_without_an_initial_state_reads_nothing_of_its_slot(backend, device, assert_close):
    case = make_case(device, [4, 3, 6], [5, 7, 2], continues=[False, True, False])
    expected = case.oracle()
    assert_close("out", case.run(backend), expected, 1e-6)
    slot = int(case.slots[0])
    assert torch.equal(case.key_ring[slot, :, :4], case.k[:4].transpose(0, 1))


@every_kernel
def test_padding_rows_of_any_length_write_zeros(backend, device, assert_close):
    case = make_case(device, [3, 40, 2, 1], [5, 7, 0, 9])
    case.slots[1] = case.slots[3] = -1
    pools = [pool.clone() for pool in case.pools]
    case.run(backend)
    assert case.out[3:43].count_nonzero() == case.out[45:].count_nonzero() == 0
    for pool, old in zip(case.pools, pools, strict=True):
        for slot in set(range(len(pool))) - set(case.slots.tolist()):
            assert torch.equal(bits(pool[slot]), bits(old[slot])), f"slot {slot}"


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_new_ring_places_are_written_bit_for_bit(backend, dtype, device):
    lengths, pending = [3, 7, 1, 0], [5, 9, 0, 4]
    case = make_case(device, lengths, pending, K=64, V=96, dtype=dtype)
    expected = [pool.clone() for pool in case.pools]
    for row, (slot, p, n) in enumerate(zip(case.slots.tolist(), pending, lengths, strict=True)):
        tokens = slice(int(case.starts[row]), int(case.starts[row]) + n)
        for ring, x in zip(expected[1:], (case.k, case.v), strict=True):
            ring[slot, :, p : p + n] = x[tokens].transpose(0, 1)
    case.run(backend)
    for name, pool, want in zip(("state", "keys", "values"), case.pools, expected, strict=True):
        assert torch.equal(bits(pool), bits(want)), name


@every_kernel
def test_rows_in_the_midst_of_a_longer_batch_leave_its_other_tokens_alone(backend, device, assert_close):
    case = make_case(device, [6, 3, 5, 4], [0, 5, 9, 0])
    whole = case.oracle()
    case.slots, case.continues, case.pending = case.slots[1:3], case.continues[1:3], case.pending[1:3]
    case.starts = case.starts[1:4]
    case.run(backend)
    assert_close("out", case.out[6:14], whole[6:14], 1e-6)
    assert case.out[:6].isnan().all() and case.out[14:].isnan().all()


class Walk:
    """One sequence's tokens q, k, v [n, H, D] going through a slot by any operation; rejected tokens are nonsense."""

    def __init__(self, backend: str, device: torch.device, num_tokens: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        self.ops = KERNELS[backend]
        self.qkv = torch.randn(num_tokens, 2, 3 * 16, generator=generator).to(device, dtype)
        self.case = make_case(device, [1], [0], dtype=dtype)
        self.first_state = self.case.state.clone()
        self.pending = self.computed = 0
        self.outs: list[Tensor] = []

    def _arguments(self, qkv: Tensor) -> tuple:
        case = self.case
        return *qkv.split(16, dim=-1), case.slopes, case.scale, case.state

    def _ring(self) -> Ring:
        return self.case.ring._replace(num_pending=torch.full_like(self.case.pending, self.pending))

    def _rows(self, m: int) -> Rows:
        starts = torch.tensor([0, m], dtype=torch.int32, device=self.case.slots.device)
        return Rows(self.case.slots, self.case.continues, starts, m)

    def _keep(self, out: Tensor, n: int) -> None:
        self.outs.append(out[:n])
        self.computed += n

    def next(self, n: int) -> Tensor:
        return self.qkv[self.computed : self.computed + n]

    def verify(self, m: int, kept: int) -> None:
        """m tokens, of which those behind `kept` are not the sequence's own."""
        if self.pending + m > RING:
            self.fold()
        qkv = torch.cat([self.next(kept), torch.full_like(self.next(m - kept), 100.0)])
        out = torch.full_like(qkv[..., :16], float("nan"))
        self.ops.verify(*self._arguments(qkv), self._ring(), self._rows(m), out)
        self._keep(out, kept)
        self.pending += kept

    def decode(self) -> None:
        qkv = self.next(1)
        out = torch.full_like(qkv[..., :16], float("nan"))
        self.ops.replay(*self._arguments(qkv), self._ring(), self._rows(1), out)
        self._keep(out, 1)
        self.pending = self.pending + 1 if self.pending < RING - 1 else 0

    def fold(self) -> None:
        self.ops.fold(self.case.slopes, self.case.state, self._ring(), self.case.slots)
        self.pending = 0

    def prefill(self, n: int) -> None:
        self.fold()
        qkv = self.next(n)
        out = torch.full_like(qkv[..., :16], float("nan"))
        self.ops.seg_la(*self._arguments(qkv), self._rows(n), out)
        self._keep(out, n)

    def check(self, assert_close, bound: float, state_bound: float) -> None:
        """Every output so far and the state, against the recurrence token by token."""
        self.fold()
        case, qkv = self.case, self.qkv[: self.computed]
        q, k, v = qkv.split(16, dim=-1)
        expected, final = recurrence(q, k, v, case.slopes, case.scale, self.first_state, self._rows(self.computed))
        assert_close("out", torch.cat(self.outs), expected, bound)
        assert_close("state", case.state[case.slots.long()], final, state_bound)


@every_kernel
@pytest.mark.parametrize("m", range(1, 9))
def test_keeping_any_part_and_going_on_is_decoding_token_by_token(backend, m, device, assert_close):
    for kept in range(1, m + 1):
        for go_on in ("decode", "verify", "prefill", "fold"):
            walk = Walk(backend, device, 3 + 2 * m + 8, torch.float32)
            walk.decode()
            walk.verify(m, kept)
            if go_on == "verify":
                walk.verify(m, m)
            elif go_on == "prefill":
                walk.prefill(5)
            elif go_on == "fold":
                walk.fold()
            walk.decode()
            walk.check(assert_close, 1e-6, 1e-6)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_steps_with_random_acceptance_are_decoding_token_by_token(backend, dtype, device, assert_close):
    skip_without_dot(backend, dtype)
    rng = random.Random(1)
    walk = Walk(backend, device, 400 if ON_GPU or backend == "torch" else 120, dtype)
    while walk.computed + RING < len(walk.qkv):
        kind = rng.choices(["verify", "decode", "fold", "prefill"], [6, 4, 1, 1])[0]
        if kind == "verify":
            m = rng.randint(1, 8)
            walk.verify(m, rng.randint(1, m))
        elif kind == "prefill":
            walk.prefill(rng.randint(2, 12))
        else:
            getattr(walk, kind)()
    walk.check(assert_close, BOUNDS[dtype], 1e-6 if dtype == torch.float32 else 3e-3)


@every_kernel
@pytest.mark.parametrize("pending", [0, 5])
def test_a_ring_that_drafts_have_filled_is_decoded_from(backend, pending, device, assert_close):
    walk = Walk(backend, device, 30, torch.float32)
    for _ in range(pending):
        walk.decode()
    walk.verify(RING - pending, RING - pending)
    assert walk.pending == RING
    walk.decode()
    assert walk.pending == 0
    walk.case.key_ring.fill_(float("nan"))  # nothing waits any more
    walk.case.value_ring.fill_(float("nan"))
    walk.decode()
    walk.check(assert_close, 1e-6, 1e-6)


@pytest.mark.gpu
def test_a_captured_verify_serves_every_place_in_the_ring(device, assert_close):
    case = make_case(device, [4, 2, 4], [0, 3, 7], heads=4, K=64, dtype=torch.bfloat16)
    expected = case.oracle()
    slots, case.slots = case.slots, torch.full_like(case.slots, -1)
    case.run("triton")  # compiles
    case.slots = slots
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run("triton")
    graph.replay()
    assert_close("out", case.out, expected, 5e-3)
    for pending in ([4, 5, 11], [12, 14, 0]):
        case.pending.copy_(torch.tensor(pending))
        for ring in case.pools[1:]:
            ring.nan_to_num_()
        expected = case.oracle()
        graph.replay()
        assert_close("out", case.out, expected, 5e-3)


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31_elements_are_addressed(device, assert_close):
    case = make_case(device, [5], [9], heads=64, K=128, state_dtype=torch.bfloat16)
    expected = case.oracle()
    slot, home = 2099, int(case.slots[0])
    pools = []
    for pool in case.pools:
        wide = torch.zeros(2100, *pool.shape[1:], dtype=pool.dtype, device=device)
        wide[slot] = pool[home]
        pools.append(wide)
    assert pools[0][:slot].numel() > 2**31
    case.state, case.key_ring, case.value_ring = pools
    case.slots.fill_(slot)
    assert_close("out", case.run("triton"), expected, 4e-3)
    assert not any(pool[:slot].any() for pool in pools)
