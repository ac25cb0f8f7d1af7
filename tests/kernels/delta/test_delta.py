"""Laws of prompts and plain decode under the gated delta rule, for every implementation, against the recurrence."""

from __future__ import annotations

import pytest
import torch
from delta_sequences import Sequences, bits, interpreted
from leyden.kernels import load
from leyden.kernels.delta.contract import CHUNK, TAPS, DeltaState

ON_GPU = torch.cuda.is_available()
OPS = {name: load(name).delta for name in ("torch", "triton")}
CONTEXTS = (0, 1, 2, 3, 63, 64, 70)
LENGTHS = [1, 2, 3, 4, 63, 64, 65, 127, 128, 129]
HEAD_DIMS = [(16, 24), (24, 16), *([(40, 72), (64, 64), (128, 128)] if ON_GPU else [])]
# Of outputs and states, by the dtype of the inputs; states in float32.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
POOLS = [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)]  # one rounding of a state

every_implementation = pytest.mark.parametrize("name", OPS)
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def needs_gpu_for_bf16_dots(name: str, dtype: torch.dtype) -> None:
    if name == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter has no bfloat16 dot")


@every_implementation
@pytest.mark.parametrize("context", CONTEXTS)
def test_prompts_of_any_length_from_any_position_follow_the_recurrence(name, context, device, assert_close):
    lengths = [1, 3, 64, 65, 129] if interpreted(name) else LENGTHS
    rows = Sequences(OPS[name], device, max(lengths), [context] * len(lengths), group=1)
    rows.prefill(lengths)
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize("group", [1, 3, 4])
def test_value_heads_share_a_key_head(name, group, device, assert_close):
    rows = Sequences(OPS[name], device, 22, (0, 5), key_heads=2, group=group)
    rows.prefill([5, 20])
    rows.decode()
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize(("K", "V"), HEAD_DIMS)
def test_any_head_dim_also_with_keys_unlike_values(name, K, V, device, assert_close):
    rows = Sequences(OPS[name], device, 80, (0, 5), K=K, V=V, group=1)
    rows.prefill([67, 3])
    rows.decode()
    rows.check(assert_close, 3e-6)


@every_implementation
def test_decode_goes_on_from_any_position(name, device, assert_close):
    rows = Sequences(OPS[name], device, 9, CONTEXTS, group=1)
    for _ in range(4 if interpreted(name) else 9):
        rows.decode()
    rows.check(assert_close, 3e-6)


@every_implementation
def test_decode_and_prompts_take_turns(name, device, assert_close):
    rows = Sequences(OPS[name], device, 40, (0, 2, 61))
    rows.decode([0, 2])
    rows.prefill([3, 1], chosen=[0, 1])
    rows.decode()
    rows.prefill([2, 9, 20])
    rows.decode([1])
    rows.check(assert_close, 3e-6)


@every_implementation
@every_half
def test_half_precision_prompts_stay_in_their_error_bound(name, dtype, device, assert_close):
    needs_gpu_for_bf16_dots(name, dtype)
    rows = Sequences(OPS[name], device, 261, (0, 5), dtype=dtype, K=64, V=64)
    rows.prefill([261, 65])
    rows.check(assert_close, BOUNDS[dtype])


@every_implementation
@every_half
def test_half_precision_decode_rounds_the_output_alone(name, dtype, device, assert_close):
    rows = Sequences(OPS[name], device, 12, (0, 70), dtype=dtype, K=64, group=1)
    for _ in range(4 if interpreted(name) else 12):
        rows.decode()
    rows.check(assert_close, BOUNDS[dtype], 3e-6)


@every_implementation
@pytest.mark.parametrize(("state_dtype", "bound"), POOLS, ids=["bf16", "fp16"])
def test_a_half_precision_pool_is_rounded_once_per_step(name, state_dtype, bound, device, assert_close):
    rows = Sequences(OPS[name], device, 70, (0, 5), state_dtype=state_dtype)
    rows.prefill([70, 20])
    rows.check(assert_close, 3e-6, bound)
    rows = Sequences(OPS[name], device, 1, (3, 5), state_dtype=state_dtype)
    rows.decode()
    rows.check(assert_close, 3e-6, bound)


@every_implementation
@pytest.mark.parametrize("decay", [1e-4, 5.0, 200.0])
def test_decay_may_be_weak_or_wipe_out_the_state(name, decay, device, assert_close):
    rows = Sequences(OPS[name], device, 140, (0, 5), decays=[decay, 0.01])
    rows.prefill([130, 70])
    for _ in range(3):
        rows.decode()
    rows.check(assert_close, 5e-6)


@every_implementation
@pytest.mark.parametrize("strength", [0.0, 30.0], ids=["half", "full"])
def test_one_token_repeated_a_thousand_times(name, strength, device, assert_close):
    rows = Sequences(OPS[name], device, 1003, decays=[1e-3, 0.0], group=1)
    for x in rows.tokens:
        x.copy_(x[:, :1].clone().expand_as(x))
    rows.tokens.strength.fill_(strength)
    rows.prefill(260 if interpreted(name) else 1000)
    for _ in range(3):
        rows.decode()
    rows.check(assert_close, 1e-5)


@every_implementation
def test_gates_are_exact_far_from_zero(name, device, assert_close):
    rows = Sequences(OPS[name], device, 12, (0, 5), decays=[50.0, 1.0])
    rows.tokens.step.copy_(torch.linspace(-40.0, 40.0, rows.tokens.step.numel()).view_as(rows.tokens.step))
    rows.tokens.strength.copy_(rows.tokens.step * 3)
    rows.prefill(8)
    for _ in range(4):
        rows.decode()
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize("cut", [64, 128])
def test_a_prompt_resumed_at_a_multiple_of_the_chunk_is_the_uncut_one_bit_for_bit(name, cut, device):
    whole, halves = (Sequences(OPS[name], device, 150, (0, 64), group=1) for _ in range(2))
    whole.prefill(150)
    halves.prefill(cut)
    halves.prefill(150 - cut)
    for row in whole.all:
        assert torch.equal(bits(torch.cat(whole.outs[row])), bits(torch.cat(halves.outs[row])))
        assert torch.equal(bits(whole.pool.state[whole.slots[row]]), bits(halves.pool.state[halves.slots[row]]))


@every_implementation
@pytest.mark.parametrize("cut", [(1, 1, 1, 147), (100, 50), (2, 65, 83)], ids=str)
def test_output_does_not_depend_on_how_a_prompt_is_cut(name, cut, device, assert_close):
    rows = Sequences(OPS[name], device, 150)
    for length in cut:
        rows.prefill(length)
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_snapshots_on_the_way_are_what_a_shorter_prompt_leaves(name, dtype, device):
    def sequences() -> Sequences:
        return Sequences(OPS[name], device, 140, (0, 61, 64), group=1)

    rows = sequences()
    snapshots = DeltaState(*(part[:5].to(dtype, copy=True)[::2] for part in rows.pool))  # strided
    places = [(0, 64, 2), (0, 128, 0), (1, 3, 1), (2, 64, -1)]
    rows.prefill([140, 20, 70], places, snapshots)
    for row, n, place in places[:3]:
        short = sequences()
        short.prefill([n], chosen=[row])
        slot, end = short.slots[row], short.position(row)
        assert torch.equal(bits(snapshots.state[place]), bits(short.pool.state[slot].to(dtype)))
        for position in range(end - TAPS + 1, end):
            kept = short.pool.tail[slot, position % TAPS].to(dtype)
            assert torch.equal(snapshots.tail[place, position % TAPS], kept)


@every_implementation
@pytest.mark.parametrize("lengths", [[37, 27], [1, 63, 64, 128]], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(name, lengths, device):
    contexts = [0, 30, 64, 3][: len(lengths)]
    together, alone = (Sequences(OPS[name], device, CHUNK * 2, contexts, group=1) for _ in range(2))
    together.prefill(lengths)
    for row, length in enumerate(lengths):
        alone.prefill([length], chosen=[row])
    for row in together.all:
        assert torch.equal(bits(together.outs[row][0]), bits(alone.outs[row][0]))
    assert torch.equal(bits(together.pool.state[together.slots]), bits(alone.pool.state[alone.slots]))


@every_implementation
def test_many_decode_steps_do_not_drift(name, device, assert_close):
    steps = 4096 if ON_GPU else 300 if name == "torch" else 20
    rows = Sequences(OPS[name], device, steps, group=1, decays=[0.004])
    for _ in range(steps):
        rows.decode()
    rows.check(assert_close, 1e-5)


@pytest.mark.gpu
def test_a_captured_decode_step_serves_every_position(device, assert_close):
    rows = Sequences(OPS["triton"], device, 9, (0, 1, 70), key_heads=2, K=64, V=64, dtype=torch.bfloat16)
    rows.decode()
    pool, weights = rows.pool, rows.weights
    slots = torch.tensor(rows.slots, dtype=torch.int32, device=device)
    step = rows.rows_of_one(slots)
    contexts = torch.tensor([rows.position(row) for row in rows.all], dtype=torch.int32, device=device)
    inputs = type(rows.tokens)(*(x[:, 1].clone() for x in rows.tokens))
    out = torch.empty(3, *pool.state.shape[1:3], dtype=torch.bfloat16, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS["triton"].decode(inputs, weights, pool, step, contexts, out)
    for t in range(1, 9):
        for buffer, x in zip(inputs, rows.tokens, strict=True):
            buffer.copy_(x[:, t])
        graph.replay()
        contexts += 1
        for row in rows.all:
            rows.outs[row].append(out[row : row + 1].clone())
            rows.computed[row] += 1
    rows.check(assert_close, 5e-3, 3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 70])
def test_slots_beyond_two_to_the_31_elements_are_addressed(length, device, assert_close):
    rows = Sequences(OPS["triton"], device, length, (5,), key_heads=16, K=128, V=128)
    rows.move(0, slot=4100)
    assert rows.pool.state[:4100].numel() > 2**31
    if length == 1:
        rows.decode()
    else:
        rows.prefill(length)
    rows.check(assert_close, 3e-6)
