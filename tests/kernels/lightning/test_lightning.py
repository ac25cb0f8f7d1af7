"""Laws of lightning attention, for every implementation, against the token recurrence in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from leyden.kernels import load
from leyden.kernels.bundles import Rows
from leyden.kernels.lightning import minimax
from leyden.kernels.lightning.reference import recurrence
from torch import Tensor

ON_GPU = torch.cuda.is_available()
TORCH_OPS, TRITON_OPS = load("torch").lightning, load("triton").lightning
PREFILL = {
    "torch": TORCH_OPS.minimax,
    "torch_segments": TORCH_OPS.seg_la,
    "minimax": TRITON_OPS.minimax,
    "seg_la": TRITON_OPS.seg_la,
}
TRITON = ("minimax", "seg_la")
DECODE = ("torch", "minimax", "seg_la")
LENGTHS = [1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 255, 256, 257, 300, *([511, 1000, 2049] if ON_GPU else [])]
HEADS = [1, 3, 6, 8, *([64] if ON_GPU else [])]
HEAD_DIMS = [(16, 16), (64, 64), (96, 96), (128, 128), (256, 256), (32, 80), (96, 16)]
# Error bounds (output, state) by the dtype of q, k and v, states in float32.
BOUNDS = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (5e-3, 3e-3), torch.float16: (1e-3, 1e-3)}

# One rounding of a state to bfloat16 or float16; Triton's interpreter truncates to bfloat16.
POOLS = [(torch.bfloat16, 3e-3 if ON_GPU else 4e-3), (torch.float16, 5e-4)]

every_prefill = pytest.mark.parametrize("backend", PREFILL)
every_decode = pytest.mark.parametrize("backend", DECODE)


@dataclass(frozen=True)
class Case:
    """Rows of a step, with everything that an implementation takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor
    scale: float
    state: Tensor
    state_indices: Tensor
    has_initial_state: Tensor
    query_start_loc: Tensor
    out: Tensor

    @property
    def lengths(self) -> list[int]:
        return self.query_start_loc.diff().tolist()

    def rows(self, max_len: int) -> Rows:
        return Rows(self.state_indices, self.has_initial_state, self.query_start_loc, max_len)

    def tokens_of(self, row: int) -> slice:
        return slice(int(self.query_start_loc[row]), int(self.query_start_loc[row + 1]))


def make_case(
    device: torch.device,
    lengths: list[int],
    *,
    continues: list[bool] | None = None,
    slots: list[int] | None = None,
    heads: int = 2 if ON_GPU else 1,
    K: int = 16,
    V: int | None = None,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    slopes: list[float] | None = None,
    seed: int = 0,
) -> Case:
    """Random rows; q, k, v are views of one interleaved projection, the pool is permuted and has spare slots."""
    generator = torch.Generator().manual_seed(seed)
    V = K if V is None else V
    rows, tokens = len(lengths), sum(lengths)
    qkv = torch.randn(tokens, heads, 2 * K + V, generator=generator).to(device, dtype)
    q, k, v = qkv.split([K, K, V], dim=-1)
    state = torch.randn(rows + 3, heads, K, V, generator=generator).to(device, state_dtype)
    if slots is None:
        slots = torch.randperm(rows + 3, generator=generator)[:rows].tolist()
    assert max(slots) < rows + 3
    if continues is None:
        continues = [row % 2 == 0 for row in range(rows)]
    slopes = slopes or [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]
    return Case(
        q,
        k,
        v,
        torch.tensor(slopes, device=device),
        K**-0.5,
        state,
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(continues, device=device),
        torch.tensor([0, *lengths], device=device).cumsum(0).int(),
        torch.full((tokens, heads, V), float("nan"), dtype=dtype, device=device),
    )


def run_prefill(backend: str, case: Case) -> tuple[Tensor, Tensor]:
    """Output and the pool after it; the case's own pool stays as it was."""
    state = case.state.clone(memory_format=torch.preserve_format)
    returned = PREFILL[backend](
        case.q,
        case.k,
        case.v,
        case.slopes,
        case.scale,
        state,
        case.rows(max(case.lengths)),
        case.out,
    )
    assert returned is case.out
    return case.out, state


def decode_step(backend: str, case: Case, state: Tensor) -> Tensor:
    """One token for each row of the case, `state` in place."""
    decode = {"torch": TORCH_OPS.decode, "minimax": TRITON_OPS.decode, "seg_la": TRITON_OPS.seg_la}[backend]
    return decode(case.q, case.k, case.v, case.slopes, case.scale, state, case.rows(1), case.out)


def oracle(case: Case) -> tuple[Tensor, Tensor]:
    """Outputs and the rows' final states, in float64."""
    rows = case.rows(max(case.lengths))
    return recurrence(case.q, case.k, case.v, case.slopes, case.scale, case.state, rows)


def states_of(case: Case, pool: Tensor) -> Tensor:
    return pool[case.state_indices.long()]


def needs_gpu_for_bf16_dots(backend: str, dtype: torch.dtype) -> None:
    if backend in TRITON and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter has no bfloat16 dot")


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


@every_prefill
@pytest.mark.parametrize("length", LENGTHS, ids=lambda n: f"n{n}")
def test_every_length_follows_the_token_recurrence(backend, length, device, assert_close):
    case = make_case(device, [length, 3], continues=[True, False])
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill(backend, case)
    assert_close("out", out, expected_out, 1e-6)
    assert_close("state", states_of(case, pool), expected_state, 1e-6)


@every_prefill
@pytest.mark.parametrize("heads", HEADS, ids=lambda n: f"h{n}")
def test_any_number_of_heads(backend, heads, device, assert_close):
    case = make_case(device, [5, 70 if ON_GPU else 37], heads=heads)
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill(backend, case)
    assert_close("out", out, expected_out, 1e-6)
    assert_close("state", states_of(case, pool), expected_state, 1e-6)


@every_prefill
@pytest.mark.parametrize(("K", "V"), HEAD_DIMS)
def test_any_head_dim_also_with_keys_unlike_values(backend, K, V, device, assert_close):
    case = make_case(device, [67, 1], K=K, V=V)
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill(backend, case)
    assert_close("out", out, expected_out, 1e-6)
    assert_close("state", states_of(case, pool), expected_state, 1e-6)


@every_decode
@pytest.mark.parametrize(("K", "V"), HEAD_DIMS)
def test_decode_follows_the_token_recurrence_for_any_head_dim(backend, K, V, device, assert_close):
    case = make_case(device, [1] * 3, heads=3 if ON_GPU else 1, K=K, V=V)
    expected_out, expected_state = oracle(case)
    pool = case.state.clone()
    assert_close("out", decode_step(backend, case, pool), expected_out, 1e-6)
    assert_close("state", states_of(case, pool), expected_state, 1e-6)


@every_prefill
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 128] if ON_GPU else [16], ids=lambda n: f"k{n}")
def test_half_precision_stays_in_its_error_bound(backend, dtype, K, device, assert_close):
    needs_gpu_for_bf16_dots(backend, dtype)
    case = make_case(device, [300, 1, 65] if ON_GPU else [261, 1], dtype=dtype, K=K)
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill(backend, case)
    assert_close("out", out, expected_out, BOUNDS[dtype][0])
    assert_close("state", states_of(case, pool), expected_state, BOUNDS[dtype][1])


@every_decode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_decode_stays_in_its_error_bound(backend, dtype, device, assert_close):
    case = make_case(device, [1] * 5, dtype=dtype, K=64)
    expected_out, expected_state = oracle(case)
    pool = case.state.clone()
    assert_close("out", decode_step(backend, case, pool), expected_out, BOUNDS[dtype][0])
    assert_close("state", states_of(case, pool), expected_state, 1e-6)


@every_prefill
@pytest.mark.parametrize(("state_dtype", "bound"), POOLS, ids=["bf16", "fp16"])
def test_a_half_precision_pool_is_rounded_once_per_step(backend, state_dtype, bound, device, assert_close):
    case = make_case(device, [70, 1, 20], state_dtype=state_dtype)
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill(backend, case)
    assert pool.dtype == state_dtype
    assert_close("out", out, expected_out, 1e-6)
    assert_close("state", states_of(case, pool), expected_state, bound)


@every_decode
@pytest.mark.parametrize(("state_dtype", "bound"), POOLS, ids=["bf16", "fp16"])
def test_decode_takes_a_half_precision_pool(backend, state_dtype, bound, device, assert_close):
    for rows in (1, 4):
        case = make_case(device, [1] * rows, state_dtype=state_dtype)
        expected_out, expected_state = oracle(case)
        pool = case.state.clone()
        assert_close("out", decode_step(backend, case, pool), expected_out, 1e-6)
        assert_close("state", states_of(case, pool), expected_state, bound)


@every_prefill
@pytest.mark.parametrize("length", [1, 2, 64, 300])
def test_a_new_row_never_reads_the_previous_owner_of_its_slot(backend, length, device, assert_close):
    case = make_case(device, [length, 1], continues=[False, False])
    case.state.fill_(float("nan"))
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill(backend, case)
    assert_close("out", out, expected_out, 1e-6)
    assert_close("state", states_of(case, pool), expected_state, 1e-6)


@every_decode
@pytest.mark.parametrize("rows", [1, 3])
def test_one_token_prompt_in_decode_never_reads_the_previous_owner_of_its_slot(backend, rows, device, assert_close):
    case = make_case(device, [1] * rows, continues=[False] * rows)
    case.state.fill_(float("nan"))
    expected_out, expected_state = oracle(case)
    pool = case.state.clone()
    assert_close("out", decode_step(backend, case, pool), expected_out, 1e-6)
    assert_close("state", states_of(case, pool), expected_state, 1e-6)


@every_prefill
def test_a_one_token_row_that_continues_reads_its_state(backend, device, assert_close):
    case = make_case(device, [1], continues=[True])
    out, _ = run_prefill(backend, case)
    fresh, _ = run_prefill(backend, replace(case, has_initial_state=~case.has_initial_state, out=case.out.clone()))
    assert_close("out", out, oracle(case)[0], 1e-6)
    assert (out - fresh).abs().max() > 0.1


CUTS = [[256, 264], [1, 519], [300, 1, 1, 218], *([[64] * 8 + [8], [255, 257, 8]] if ON_GPU else [])]


@every_prefill
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut[:3])))
def test_output_does_not_depend_on_how_a_prompt_is_cut(backend, cut, device, assert_close):
    # Slow decay: a history decayed by e^{-s c} for e^{-s (c + 1)} errs by s, 4e-3.
    case = make_case(device, [sum(cut)], continues=[False], heads=1, slopes=[0.004])
    whole, pool = run_prefill(backend, case)
    assert_close("whole", whole, oracle(case)[0], 1e-6)
    state, start, pieces = case.state, 0, []
    for length in cut:
        tokens = slice(start, start + length)
        piece = replace(
            case,
            q=case.q[tokens],
            k=case.k[tokens],
            v=case.v[tokens],
            state=state,
            has_initial_state=torch.tensor([start > 0], device=device),
            query_start_loc=torch.tensor([0, length], dtype=torch.int32, device=device),
            out=torch.full_like(case.out[tokens], float("nan")),
        )
        out, state = run_prefill(backend, piece)
        pieces.append(out)
        start += length
    assert_close("out", torch.cat(pieces), whole, 1e-6)
    assert_close("state", states_of(case, state), states_of(case, pool), 1e-6)


@pytest.fixture(params=["in order", "last program first"])
def many_chunks(request, monkeypatch) -> None:
    """`minimax` cuts rows into chunks as short as it can, whose programs run in either order."""
    monkeypatch.setattr(minimax, "SHORTEST_CHUNK", 1)
    monkeypatch.setattr(minimax, "PROGRAMS_PER_PROCESSOR", 1 << 20)
    if request.param == "in order":
        return
    if ON_GPU:
        pytest.skip("the order is the device's own")
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    def backwards(self, *index: int) -> None:
        self.grid_idx = tuple(size - 1 - i for size, i in zip(self.grid_dim, index, strict=True))

    assert isinstance(interpreter_builder, InterpreterBuilder)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)


@pytest.mark.parametrize("slopes", [[0.004], [0.8], [4.0]], ids=["slow decay", "four in reach", "the last alone"])
def test_minimax_with_many_chunks_per_row(many_chunks, slopes, device, assert_close):
    # Whole chunks, tails, a row of one chunk, an empty one, padding between: no two may share a place.
    lengths = [200, 0, 96, 65, 32, 160, 64]
    case = make_case(
        device, lengths, heads=1, slopes=slopes, slots=[3, 4, 1, -1, 0, 6, 2], continues=[True, False] * 3 + [True]
    )
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill("minimax", case)
    assert_close("out", out, expected_out, 1e-6)
    for row in (0, 2, 4, 5, 6):
        assert_close(f"state of row {row}", pool[case.state_indices[row]], expected_state[row], 1e-6)
    assert torch.equal(pool[[4, 5, 7, 8]], case.state[[4, 5, 7, 8]])


@every_prefill
def test_a_row_does_not_depend_on_its_neighbours(backend, device, assert_close):
    case = make_case(device, [40, 24, 100, 1, 1], continues=[True, False, True, False, True])
    together, pool = run_prefill(backend, case)
    together = together.clone()
    for row in range(5):
        tokens = case.tokens_of(row)
        alone = replace(
            case,
            q=case.q[tokens],
            k=case.k[tokens],
            v=case.v[tokens],
            state_indices=case.state_indices[row : row + 1],
            has_initial_state=case.has_initial_state[row : row + 1],
            query_start_loc=case.query_start_loc[row : row + 2] - case.query_start_loc[row],
            out=torch.full_like(case.out[tokens], float("nan")),
        )
        out, alone_pool = run_prefill(backend, alone)
        assert_close(f"out of row {row}", together[tokens], out, 1e-6)
        assert_close(f"state of row {row}", states_of(alone, pool), states_of(alone, alone_pool), 1e-6)


@every_prefill
@pytest.mark.parametrize("lengths", [[37, 27], [100, 156], [1, 63, 64, 128], [30, 2]], ids=str)
def test_a_tail_block_has_its_true_length_and_absorbs_nothing_of_the_next_row(backend, lengths, device, assert_close):
    # The token counts fill whole blocks while the rows do not; every second row is NaN.
    case = make_case(device, lengths, continues=[True] * len(lengths))
    expected_out, expected_state = oracle(case)
    for row in range(1, len(lengths), 2):
        for x in (case.q, case.k, case.v):
            x[case.tokens_of(row)] = float("nan")
    out, pool = run_prefill(backend, case)
    final = states_of(case, pool)
    for row in range(0, len(lengths), 2):
        assert_close(f"out of row {row}", out[case.tokens_of(row)], expected_out[case.tokens_of(row)], 1e-6)
        assert_close(f"state of row {row}", final[row], expected_state[row], 1e-6)


@every_prefill
@pytest.mark.parametrize("length", [1, 37, 257])
def test_other_slots_stay_untouched_bit_for_bit(backend, length, device):
    case = make_case(device, [length, 2, 9], slots=[4, 0, 2])
    case.state[1].fill_(float("nan"))
    case.state[5].view(torch.int32).fill_(0x7FABCDEF)  # a NaN with a payload, which arithmetic would not keep
    _, pool = run_prefill(backend, case)
    for slot in (1, 3, 5):
        assert torch.equal(bits(pool[slot]), bits(case.state[slot])), f"slot {slot}"
    assert not torch.equal(pool[[4, 0, 2]], case.state[[4, 0, 2]])


@every_decode
def test_decode_leaves_other_slots_untouched_bit_for_bit(backend, device):
    for slots in ([2], [4, 0, 2]):
        case = make_case(device, [1] * len(slots), slots=slots)
        case.state[3].view(torch.int32).fill_(0x7FABCDEF)  # a NaN with a payload
        pool = case.state.clone()
        decode_step(backend, case, pool)
        for slot in set(range(len(pool))) - set(slots):
            assert torch.equal(bits(pool[slot]), bits(case.state[slot])), f"slot {slot}"


@every_prefill
def test_padding_rows_write_zeros_and_leave_the_pool_alone(backend, device, assert_close):
    case = make_case(device, [33, 1, 1, 40, 1], heads=2, slots=[2, 5, -1, -1, -1])
    expected_out, expected_state = oracle(case)
    case.state[6:].fill_(float("nan"))  # where slot -1 would land
    for x in (case.q, case.k, case.v):
        x[case.tokens_of(3)] = float("nan")
    out, pool = run_prefill(backend, case)
    assert torch.equal(bits(out[34:]), torch.zeros_like(bits(out[34:])))
    assert_close("out", out[:34], expected_out[:34], 1e-6)
    assert_close("state", pool[[2, 5]], expected_state[:2], 1e-6)
    for slot in (0, 1, 3, 4, 6, 7):
        assert torch.equal(bits(pool[slot]), bits(case.state[slot])), f"slot {slot}"


@every_decode
@pytest.mark.parametrize("slots", [[-1], [3, -1, 1, -1], [-1, -1]], ids=str)
def test_padding_rows_of_decode_write_zeros_and_leave_the_pool_alone(backend, slots, device, assert_close):
    case = make_case(device, [1] * len(slots), slots=slots, continues=[True] * len(slots))
    expected_out, expected_state = oracle(case)
    pool = case.state.clone()
    out = decode_step(backend, case, pool)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(bits(out[row]), torch.zeros_like(bits(out[row])))
        else:
            assert_close("out", out[row], expected_out[row], 1e-6)
            assert_close("state", pool[slot], expected_state[row], 1e-6)
    for slot in set(range(len(pool))) - set(slots):
        assert torch.equal(bits(pool[slot]), bits(case.state[slot])), f"slot {slot}"


@every_prefill
@pytest.mark.parametrize("lengths", [[0, 5, 0, 0, 66, 0], [0, 1, 0, 0, 1, 0]], ids=str)
def test_empty_rows_are_harmless(backend, lengths, device, assert_close):
    case = make_case(device, lengths, continues=[False, True, True, False, False, True])
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill(backend, case)
    assert_close("out", out, expected_out, 1e-6)
    for row, length in enumerate(case.lengths):
        slot = case.state_indices[row]
        if length:
            assert_close(f"state of row {row}", pool[slot], expected_state[row], 1e-6)
        else:
            assert torch.equal(bits(pool[slot]), bits(case.state[slot])), f"row {row} is empty"


@every_prefill
def test_strided_pool_and_output_need_no_copy(backend, device, assert_close):
    case = make_case(device, [65, 1, 1], heads=2)
    layers = torch.randn(len(case.state), 3, *case.state.shape[1:], device=device)
    pool = layers[:, 1]
    pool.copy_(case.state)
    kept = layers.clone()
    wide = torch.full((case.out.shape[0], 2, 48), float("nan"), device=device)
    expected_out, expected_state = oracle(case)
    out = PREFILL[backend](
        case.q,
        case.k,
        case.v,
        case.slopes,
        case.scale,
        pool,
        case.rows(65),
        wide[:, :, 16:32],
    )
    assert_close("out", out, expected_out, 1e-6)
    assert wide[:, :, :16].isnan().all()
    assert wide[:, :, 32:].isnan().all()
    assert_close("state", states_of(case, pool), expected_state, 1e-6)
    assert torch.equal(layers[:, [0, 2]], kept[:, [0, 2]])


@every_prefill
def test_steep_slopes_do_not_overflow(backend, device, assert_close):
    case = make_case(device, [300 if ON_GPU else 70, 20], heads=2, slopes=[8.0, 2.8])
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill(backend, case)
    assert_close("out", out, expected_out, 1e-6)
    assert_close("state", states_of(case, pool), expected_state, 1e-6)


@every_decode
def test_thousands_of_decode_steps_do_not_drift(backend, device, assert_close):
    # Slow decay: an error of 1e-7 in e^{-s} grows to 2.5e-5. Interpreted kernels take fewer steps.
    steps = 4096 if ON_GPU else 512 if backend == "torch" else 160
    case = make_case(device, [steps], continues=[False], heads=1, slopes=[0.004])
    expected_out, expected_state = oracle(case)
    pool = case.state.clone().fill_(float("nan"))
    outs = []
    for t in range(steps):
        tokens = slice(t, t + 1)
        step = replace(
            case,
            q=case.q[tokens],
            k=case.k[tokens],
            v=case.v[tokens],
            has_initial_state=torch.tensor([t > 0], device=device),
            query_start_loc=torch.tensor([0, 1], dtype=torch.int32, device=device),
            out=case.out[tokens],
        )
        outs.append(decode_step(backend, step, pool))
    assert_close("out", torch.cat(outs), expected_out, 3e-6)
    assert_close("state", states_of(case, pool), expected_state, 3e-6)


def test_all_implementations_agree_on_a_mixed_batch(device, assert_close):
    case = make_case(device, [270, 1, 17, 1, 1], heads=3 if ON_GPU else 2)
    expected_out, expected_state = oracle(case)
    for backend in PREFILL:
        out, pool = run_prefill(backend, replace(case, out=case.out.clone()))
        assert_close(f"out of {backend}", out, expected_out, 1e-6)
        assert_close(f"state of {backend}", states_of(case, pool), expected_state, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", TRITON)
def test_slots_beyond_two_to_the_31_elements_are_addressed(backend, device, assert_close):
    heads, K, num_slots = 64, 128, 2100
    pool = torch.zeros(num_slots, heads, K, K, dtype=torch.bfloat16, device=device)
    assert pool[:2099].numel() > 2**31
    for lengths in ([65, 1], [1, 1]):
        case = make_case(device, lengths, heads=heads, K=K, state_dtype=torch.bfloat16, continues=[True, True])
        case = replace(case, state_indices=torch.tensor([2099, 2050], dtype=torch.int32, device=device))
        small = torch.randn(2, heads, K, K, device=device).bfloat16()
        pool.zero_()
        pool[2099], pool[2050] = small
        inputs = (case.q, case.k, case.v, case.slopes, case.scale)
        rows = case.rows(max(lengths))
        expected_out, expected_state = recurrence(*inputs, small, rows._replace(slots=torch.tensor([0, 1])))
        if max(lengths) == 1 and backend == "minimax":
            TRITON_OPS.decode(*inputs, pool, rows, case.out)
        else:
            PREFILL[backend](*inputs, pool, rows, case.out)
        assert_close("out", case.out, expected_out, 1e-6)
        assert_close("state", pool[[2099, 2050]], expected_state, 3e-3)
        assert not pool[:2050].any()
        assert not pool[2051:2099].any()


@every_prefill
def test_scores_beyond_the_range_of_float16(backend, device, assert_close):
    case = make_case(device, [40], dtype=torch.float16, K=64, V=16, continues=[False])
    case.q.fill_(33.0)
    case.k.fill_(33.0)
    case = replace(case, scale=1.0, v=case.v * 1e-3)  # 64 * 33 * 33 = 69,696, more than float16 holds
    out, _ = run_prefill(backend, case)
    assert_close("out", out, oracle(case)[0], 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", TRITON)
def test_a_served_shape_stays_in_its_error_bound(backend, dtype, device, assert_close):
    case = make_case(device, [1500, 300, 1, 700, 1, 1, 64], heads=16, K=128, dtype=dtype)
    expected_out, expected_state = oracle(case)
    out, pool = run_prefill(backend, case)
    assert_close("out", out, expected_out, BOUNDS[dtype][0])
    assert_close("state", states_of(case, pool), expected_state, BOUNDS[dtype][1])


@pytest.mark.gpu
def test_no_kernel_synchronises_with_the_host(device):
    case = make_case(device, [300, 1, 17], heads=4, K=64, dtype=torch.bfloat16)
    step = make_case(device, [1] * 4, heads=4, K=64, dtype=torch.bfloat16)
    arguments = (case.q, case.k, case.v, case.slopes, case.scale, case.state, case.rows(300), case.out)

    def everything() -> None:
        TRITON_OPS.minimax(*arguments)
        TRITON_OPS.seg_la(*arguments)
        decode_step("minimax", step, step.state)
        decode_step("seg_la", step, step.state)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", TRITON)
def test_a_captured_decode_serves_other_slots_and_padding(backend, device, assert_close):
    case = make_case(device, [1] * 4, heads=4, K=64, continues=[True] * 4)
    pool = case.state.clone()
    decode_step(backend, case, pool)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_step(backend, case, pool)
    case.state_indices.copy_(torch.tensor([6, -1, 0, 3]))
    pool.copy_(case.state)
    expected_out, expected_state = oracle(case)
    graph.replay()
    real = [0, 2, 3]
    assert_close("out", case.out[real], expected_out[real], 1e-6)
    assert_close("state", pool[[6, 0, 3]], expected_state[real], 1e-6)
    assert case.out[1].count_nonzero() == 0
    assert torch.equal(pool[[1, 2, 4, 5]], case.state[[1, 2, 4, 5]])


SNAPSHOT = {"torch": TORCH_OPS.snapshot, "triton": TRITON_OPS.snapshot}


@pytest.mark.parametrize("ops", SNAPSHOT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 80), *([(96, 96), (128, 128)] if ON_GPU else [])])
def test_a_snapshot_is_the_state_that_a_row_passes(ops, dtype, K, V, device, assert_close):
    """New rows and old, slopes from nearly none to such that the first tokens vanish."""
    if ops == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter has no bfloat16 dot")
    case = make_case(device, [40, 130, 1, 300], K=K, V=V, dtype=dtype, heads=3, slopes=[0.004, 0.4, 4.0])
    asked = [(0, 1), (0, 39), (1, 64), (1, 65), (1, 130), (2, 1), (3, 299), (3, 128)]
    places = [3, 0, 9, 7, 1, 2, 8, 4]
    snapshots = [(row, n, place) for (row, n), place in zip(asked, places, strict=True)]
    before = case.state.clone()
    pool = torch.full((10, 2, 3, K, V), float("nan"), device=device)  # of two layers, as the engine has it
    SNAPSHOT[ops](
        case.k,
        case.v,
        case.slopes,
        case.state,
        case.rows(300),
        torch.tensor([(77, 5, -1), *snapshots, (-1, -1, -1)], dtype=torch.int32, device=device),
        pool[:, 1],
    )
    assert torch.equal(case.state, before), "the pool is read only"
    assert pool[:, 0].isnan().all() and pool[[5, 6]].isnan().all(), "only the snapshots asked for are written"
    for (row, n), place in zip(asked, places, strict=True):
        cut = case.query_start_loc.clone()
        cut[row + 1 :] = cut[row] + n
        rows = case.rows(300)._replace(starts=cut)
        _, states = recurrence(case.q, case.k, case.v, case.slopes, case.scale, case.state, rows)
        assert_close(f"{n} tokens of row {row}", pool[place, 1], states[row], BOUNDS[dtype][1])
