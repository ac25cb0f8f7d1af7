"""Laws of the ring under the gated delta rule: replay, drafts and folds, for every implementation."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from delta_sequences import RING, Sequences, bits, interpreted
from leyden.kernels import load

ON_GPU = torch.cuda.is_available()
OPS = {name: load(name).delta for name in ("torch", "triton")}
CONTEXTS = (0, 1, 2, 3, 70)
HEAD_DIMS = [(16, 24), *([(40, 72), (128, 128)] if ON_GPU else [])]
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

every_implementation = pytest.mark.parametrize("name", OPS)


def needs_gpu_for_bf16_dots(name: str, dtype: torch.dtype) -> None:
    if name == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter has no bfloat16 dot")


@every_implementation
def test_forty_steps_of_replay_are_the_recurrence(name, device, assert_close):
    steps, contexts = (18, (0, 1)) if interpreted(name) else (40, CONTEXTS)
    rows = Sequences(OPS[name], device, steps, contexts)
    for _ in range(steps):
        rows.replay()
    assert rows.pending[:2] == [(steps - 1) % RING, steps % RING]  # a new row is folded at once
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize("group", [1, 3, 4])
def test_value_heads_share_a_key_head(name, group, device, assert_close):
    rows = Sequences(OPS[name], device, 30, (0, 5), key_heads=2, group=group)
    for _ in range(2):
        rows.replay()
    rows.verify([6, 3], [4, 3])
    rows.replay()
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize(("K", "V"), HEAD_DIMS)
def test_any_head_dim_also_with_keys_unlike_values(name, K, V, device, assert_close):
    rows = Sequences(OPS[name], device, 26, (0, 5), K=K, V=V)
    rows.replay()
    rows.verify([6, 9], [2, 9])
    rows.replay()
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_replay_rounds_keys_before_their_use_and_so_loses_nothing_later(
    name, dtype, device, assert_close
):
    steps = 4 if interpreted(name) else 40
    for key_dtype, bound in ((torch.float32, 3e-6), (dtype, BOUNDS[dtype])):
        rows = Sequences(OPS[name], device, steps, (5, 70), dtype=dtype, key_dtype=key_dtype, group=1)
        for _ in range(steps):
            rows.replay()
        rows.check(assert_close, BOUNDS[dtype], bound)
    once, folded = (Sequences(OPS[name], device, 4, (5, 70), dtype=dtype, group=1) for _ in range(2))
    for _ in range(4):
        once.replay()
        folded.replay()
        folded.fold()
    once.fold()
    assert_close("state", folded.pool.state[folded.slots], once.pool.state[once.slots], 3e-6)


@every_implementation
def test_the_state_is_written_when_the_ring_is_full_and_not_before(name, device):
    rows = Sequences(OPS[name], device, RING, (5,), group=1)
    for _ in range(RING - 1):
        rows.replay()
        for part, first in zip(rows.pool, rows.first, strict=True):
            assert torch.equal(bits(part), bits(first))
    rows.replay()
    assert not torch.equal(rows.pool.state[rows.slots], rows.first.state[rows.slots])


@every_implementation
@pytest.mark.parametrize(
    ("state_dtype", "bound"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)], ids=["bf16", "fp16"]
)
def test_a_half_precision_state_is_rounded_once_per_cycle(name, state_dtype, bound, device, assert_close):
    rows = Sequences(OPS[name], device, RING - 1, (5,), state_dtype=state_dtype, group=1)
    for _ in range(RING - 1):
        rows.replay()
    rows.check(assert_close, bound, bound)


@every_implementation
def test_rows_may_be_at_different_places_of_their_rings(name, device, assert_close):
    steps = 8 if interpreted(name) else 24
    rows = Sequences(OPS[name], device, steps, (0, 2, 70), group=1)
    for t in range(steps + 5):
        rows.replay([row for row in rows.all if 0 <= t - (0, 2, 5)[row] < steps])
    rows.check(assert_close, 3e-6)


@every_implementation
def test_a_fold_in_mid_ring_is_a_state_to_go_on_from(name, device, assert_close):
    steps = 8 if interpreted(name) else 30
    rows = Sequences(OPS[name], device, steps, (0, 1, 5), group=1)
    for t in range(steps):
        rows.replay()
        if t in (1, 2, 4, 5, 20):
            rows.fold()
            for part in rows.ring[:4]:
                part[rows.slots] = float("nan")  # nothing that waited is needed any more
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize("pending", range(RING) if ON_GPU else (0, 1, 2, 3, 9, 15))
def test_drafts_follow_the_recurrence_from_any_place_of_the_ring(name, pending, device, assert_close):
    rows = Sequences(OPS[name], device, RING, (5, 1, 70), group=1)
    for _ in range(pending // 8):
        rows.verify(8, 8)
    if pending % 8:
        rows.verify(pending % 8, pending % 8)
    room = RING - pending
    rows.verify([room, 1, (room + 1) // 2], [room, 1, (room + 1) // 2])
    rows.check(assert_close, 3e-6)


@every_implementation
def test_drafts_of_a_new_row_read_nothing_of_its_slot(name, device, assert_close):
    rows = Sequences(OPS[name], device, 24, (0, 0, 0, 5))
    rows.verify([5, 1, 2, 4], [3, 1, 2, 1])
    rows.verify([5, 4, 3, 4], [3, 1, 2, 4])
    rows.replay()
    rows.check(assert_close, 3e-6)


@every_implementation
def test_only_the_new_ring_places_are_written_bit_for_bit(name, device):
    rows = Sequences(OPS[name], device, 20, (5, 1, 70), key_heads=2, K=24)
    for _ in range(4):
        rows.replay()
    before = [part.clone() for part in (*rows.pool, *rows.ring[:4])]
    rows.verify([3, 7, 1], 1)
    for part, old in zip((*rows.pool, *rows.ring[:4]), before, strict=True):
        for slot, n in zip(rows.slots, [3, 7, 1], strict=True):
            if part.shape[2:3] == (RING,):
                assert not part[slot, :, 4 : 4 + n].isnan().any()
                part[slot, :, 4 : 4 + n] = old[slot, :, 4 : 4 + n]
        assert torch.equal(bits(part), bits(old))


@every_implementation
def test_the_ring_has_raw_values_and_sums_of_decays(name, device, assert_close):
    rows = Sequences(OPS[name], device, 20, (5,))
    rows.replay()
    rows.verify(5, 5)
    rows.replay()
    slot, count = rows.slots[0], 7
    assert torch.equal(rows.ring.raw[slot, 0, :count], rows.tokens.raw[0, :count])
    step = rows.tokens.step[0, :count].double() + rows.weights.step_bias
    sums = -(rows.weights.decay.double().exp() * torch.nn.functional.softplus(step)).cumsum(0).t()
    assert_close("decay", rows.ring.decay[slot, :, :count], sums, 1e-6)
    assert_close("key", rows.ring.key[slot, :, :count].square().sum(-1), torch.ones(1, count, device=device), 1e-5)


@every_implementation
@pytest.mark.parametrize("m", range(1, 6) if ON_GPU else (1, 3))
def test_keeping_any_part_and_going_on_is_decoding_token_by_token(name, m, device, assert_close):
    def go_on(rows: Sequences, how: str) -> None:
        if how == "verify":
            rows.verify(m, m)
        elif how == "prefill":
            rows.fold()
            rows.prefill(5)
        elif how == "fold":
            rows.fold()

    kept = list(range(1, m + 1))
    for how in ("replay", "verify", "prefill", "fold"):
        rows = Sequences(OPS[name], device, 20, [1] * m, group=1)
        rows.replay()
        rows.verify(m, kept)
        go_on(rows, how)
        rows.replay()
        rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_steps_with_random_acceptance_are_decoding_token_by_token(name, dtype, device, assert_close):
    needs_gpu_for_bf16_dots(name, dtype)
    rng = random.Random(1)
    rows = Sequences(OPS[name], device, 300 if ON_GPU or name == "torch" else 60, (0, 3), dtype=dtype, group=1)
    rows.prefill(2)
    while max(rows.computed) + 2 * RING < rows.tokens.raw.shape[1]:
        kind = rng.choices(["verify", "replay", "fold", "prefill"], [6, 4, 1, 1])[0]
        if kind == "verify":
            lengths = [rng.randint(1, 8) for _ in rows.all]
            rows.verify(lengths, [rng.randint(1, n) for n in lengths])
        elif kind == "prefill":
            rows.fold()
            rows.prefill([rng.randint(2, 12) for _ in rows.all])
        else:
            getattr(rows, kind)()
    rows.check(assert_close, BOUNDS[dtype])


@every_implementation
@pytest.mark.parametrize("pending", [0, 2])
def test_a_ring_that_drafts_have_filled_is_decoded_from(name, pending, device, assert_close):
    rows = Sequences(OPS[name], device, 30, (5, 70), group=1)
    for _ in range(pending):
        rows.replay()
    rows.verify(RING - pending, RING - pending)
    assert rows.pending == [RING] * 2
    rows.replay()
    assert rows.pending == [0] * 2
    for part in rows.ring[:4]:
        part[rows.slots] = float("nan")  # nothing waits any more
    rows.replay()
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize("decay", [1e-4, 5.0, 200.0])
def test_decay_may_be_weak_or_wipe_out_the_state(name, decay, device, assert_close):
    rows = Sequences(OPS[name], device, 50, (0, 5), decays=[decay, 0.01])
    for kept in (1, 8, 5, 3):
        rows.verify(8, kept)
        rows.replay()
    rows.check(assert_close, 3e-6)


@every_implementation
@pytest.mark.parametrize("strength", [0.0, 30.0], ids=["half", "full"])
def test_one_token_repeated(name, strength, device, assert_close):
    rows = Sequences(OPS[name], device, 70, (5,), decays=[1e-3, 0.0])
    for x in rows.tokens:
        x.copy_(x[:, :1].clone().expand_as(x))
    rows.tokens.strength.fill_(strength)
    for _ in range(3):
        rows.verify(RING, RING)
        rows.replay()
    rows.check(assert_close, 1e-5)


@every_implementation
def test_many_steps_do_not_drift(name, device, assert_close):
    steps = 4096 if ON_GPU else 300 if name == "torch" else 33
    rows = Sequences(OPS[name], device, steps, group=1, decays=[0.004])
    for _ in range(steps):
        rows.replay()
    rows.check(assert_close, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["replay", "verify"])
def test_a_captured_step_serves_every_place_in_the_ring(operation, device, assert_close):
    rows = Sequences(OPS["triton"], device, 40, (1, 3, 70), key_heads=2, K=64, V=64, dtype=torch.bfloat16)
    slots = torch.tensor(rows.slots, dtype=torch.int32, device=device)
    step, contexts = rows.rows_of_one(slots), torch.tensor([1, 3, 70], dtype=torch.int32, device=device)
    ring = rows.ring._replace(num_pending=torch.zeros_like(slots))
    inputs = type(rows.tokens)(*(x[:, 0].clone() for x in rows.tokens))
    out = torch.empty(3, *rows.pool.state.shape[1:3], dtype=torch.bfloat16, device=device)
    run: Callable = getattr(OPS["triton"], operation)
    arguments = inputs, rows.weights, rows.pool, ring
    run(*arguments, step._replace(slots=torch.full_like(slots, -1)), contexts, out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*arguments, step, contexts, out)
    for t in range(40 if operation == "replay" else RING):
        for buffer, x in zip(inputs, rows.tokens, strict=True):
            buffer.copy_(x[:, t])
        graph.replay()
        contexts += 1
        ring.num_pending.copy_((ring.num_pending + 1) % RING if operation == "replay" else ring.num_pending + 1)
        for row in rows.all:
            rows.outs[row].append(out[row : row + 1].clone())
            rows.computed[row] += 1
    rows.pending = ring.num_pending.tolist()
    rows.check(assert_close, 1e-2)


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31_elements_are_addressed(device, assert_close):
    rows = Sequences(OPS["triton"], device, 40, (5,), key_heads=16, K=128, V=128)
    rows.move(0, slot=4100)
    assert rows.pool.state[:4100].numel() > 2**31
    for _ in range(3):
        rows.replay()
    rows.verify(8, 5)
    for _ in range(12):
        rows.replay()
    rows.check(assert_close, 3e-6)


@every_implementation
def test_a_small_decay_keeps_its_relative_precision(name, device):
    rows = Sequences(OPS[name], device, 1, (5,), group=4, decays=[1.0])
    rows.tokens.step.copy_(torch.tensor([-12.0, -7.0, 0.1, 30.0]))
    rows.replay()
    step = rows.tokens.step[0, 0].double() + rows.weights.step_bias
    expected = -rows.weights.decay.double().exp() * torch.nn.functional.softplus(step)
    torch.testing.assert_close(rows.ring.decay[rows.slots[0], :, 0].double(), expected, rtol=2e-6, atol=0.0)
