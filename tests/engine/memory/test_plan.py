"""How memory is split: slots first, at most half; the rest to blocks; clamp and say so."""

from __future__ import annotations

import random

import pytest
from leyden.engine.errors import ConfigError
from leyden.engine.memory.plan import MemoryPlan, PoolCosts, plan_memory

SIZES = {"slot": 1000, "token": 10, "block_size": 16}
COSTS = set(PoolCosts.__dataclass_fields__)


def plan(budget: int, *, max_num_seqs: int = 8, max_model_len: int = 64, **more) -> MemoryPlan:
    costs = PoolCosts(**(SIZES | {name: more.pop(name) for name in COSTS & more.keys()}))
    return plan_memory(budget, costs, max_num_seqs=max_num_seqs, max_model_len=max_model_len, **more)


def test_with_plenty_of_memory_every_slot_can_fill_its_context_and_no_more():
    got = plan(10**9)
    assert (got.num_state_slots, got.num_kv_blocks, got.max_model_len, got.notes) == (8, 8 * 4, 64, [])


def test_slots_take_at_most_half():
    got = plan(10_000)
    assert got.num_state_slots == 5 and got.num_kv_blocks == 5 * 4
    assert any("max_num_seqs clamped from 8 to 5" in note for note in got.notes)


def test_blocks_take_the_memory_that_slots_leave():
    got = plan(17_000)
    assert (got.num_state_slots, got.num_kv_blocks, got.notes) == (8, 32, [])
    assert plan(9_600 + 6_400, max_num_seqs=8).num_kv_blocks == 32
    assert plan(16_159, max_num_seqs=8, max_model_len=6400).num_kv_blocks == 50


def test_context_is_clamped_to_the_cache():
    got = plan(16_000, max_model_len=10_000)
    assert got.max_model_len == got.num_kv_blocks * 16 == 800
    assert any("max_model_len clamped from 10000 to 800" in note for note in got.notes)


def test_context_that_ends_inside_a_block_stays_as_asked():
    got = plan(10**9, max_model_len=70)
    assert got.max_model_len == 70 and got.num_kv_blocks == 8 * 5


def test_fixed_number_of_blocks_is_taken_or_clamped():
    assert plan(10**9, num_kv_blocks=9).num_kv_blocks == 9
    got = plan(10**9, num_kv_blocks=999)
    assert got.num_kv_blocks == 32 and any("num_kv_blocks clamped from 999 to 32" in note for note in got.notes)
    got = plan(10**9, num_kv_blocks=3)
    assert got.max_model_len == 48 and len(got.notes) == 1


def test_model_without_softmax_layers_needs_no_memory_for_blocks():
    got = plan(16_000, token=0)
    assert (got.num_state_slots, got.num_kv_blocks, got.max_model_len) == (8, 32, 64)


@pytest.mark.parametrize("budget", [-5, 0, 999, 1999])
def test_plan_without_room_for_one_state_names_the_settings(budget):
    with pytest.raises(ConfigError, match="memory_fraction"):
        plan(budget)


def test_plan_without_room_for_one_block_names_the_settings():
    with pytest.raises(ConfigError, match="KV cache"):
        plan(2000, max_num_seqs=1, token=1000)


@pytest.mark.parametrize(("gigabytes", "longest"), [(1, 1_300_000), (2, 2_500_000), (4, 5_000_000), (9, 10_240_000)])
def test_a_context_is_clamped_before_it_is_charged(gigabytes, longest):
    """10,240,000 positions of 256 bytes are 2.6 GB: more than some of these shares hold."""
    budget = gigabytes * 10**9
    costs = {"token": 512, "cell": 4, "context": lambda length: 256 * length}
    got = plan(budget, max_model_len=10_240_000, **costs)
    assert got.max_model_len == pytest.approx(longest, rel=0.06) and got.num_state_slots == 8
    tables = 8 * 4 * -(-got.max_model_len // 16)
    taken = 8 * 1000 + tables + 256 * got.max_model_len + got.num_kv_blocks * 16 * 512
    assert 0 <= budget - taken < max(17_000, (longest == 10_240_000) * budget), "what is not used is idle"
    assert got.notes == [] if longest == 10_240_000 else "bytes for its positions" in got.notes[0]


def test_plan_never_exceeds_the_budget_and_always_serves_one_sequence():
    rng = random.Random(0)
    planned = 0
    for _ in range(3000):
        sizes = {
            "slot": rng.randint(1, 5000),
            "token": rng.choice([0, rng.randint(1, 100)]),
            "block_size": rng.choice([1, 16, 256]),
            "cell": rng.choice([0, 4]),
        }
        each = rng.choice([0, rng.randint(1, 100)])
        budget = rng.randint(0, 200_000)
        seqs, length = rng.randint(1, 64), rng.randint(1, 5000)
        fixed = rng.choice([None, rng.randint(1, 100)])
        try:
            got = plan(
                budget,
                max_num_seqs=seqs,
                max_model_len=length,
                num_kv_blocks=fixed,
                context=lambda length, each=each: each * length,
                **sizes,
            )
        except ConfigError:
            continue
        planned += 1

        cells, block = sizes["cell"], sizes["block_size"]

        def spare(num_blocks, length, budget=budget, each=each, sizes=sizes, seqs=seqs, cells=cells, block=block):
            """Bytes that are left, and the slots that half of the memory holds, with such a context."""
            slot = sizes["slot"] + cells * -(-length // block)
            slots = min(seqs, (budget - each * length) // 2 // slot)
            return budget - each * length - slots * slot - num_blocks * sizes["token"] * block, slots

        left, slots = spare(got.num_kv_blocks, got.max_model_len)
        assert left >= 0 and slots == got.num_state_slots
        most = min(length, fixed * block) if fixed else length
        for more in range(got.max_model_len // block + 1, most // block + 1):
            left, slots = spare(more, more * block)
            assert left < 0 or slots < 1, "a longer context would fit"
        assert 1 <= got.num_state_slots <= seqs and got.num_kv_blocks >= 1
        assert 1 <= got.max_model_len <= min(length, got.num_kv_blocks * sizes["block_size"])
        clamped = got.num_state_slots < seqs or got.max_model_len < length
        assert not clamped or got.notes, "clamped without a word"
    assert planned > 1000
