"""The batch contract, field by field, for ragged mixes made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from engines import build_batch, sequence
from leyden.engine.execution import padding
from leyden.engine.execution.block_tables import BlockTables
from leyden.engine.execution.counts import Counts
from leyden.engine.execution.graph_shapes import GraphShape
from leyden.engine.execution.step_input import BATCH
from leyden.engine.memory.operations import StepSave
from leyden.engine.scheduling.step import ScheduledBatch
from leyden.models.forward_batch import Each, ForwardBatch

CPU = torch.device("cpu")
BLOCK = 4


def mixed() -> ScheduledBatch:
    """A prompt in the middle of its chunks, a new prompt of one token, a complete new prompt, and two decode rows."""
    middle = sequence(list(range(100, 120)), block_table=[9, 3, 7, 1], state_slot=5, num_computed_tokens=6)
    single = sequence([42], block_table=[0], state_slot=0)
    whole = sequence([50, 51, 52, 53, 54], block_table=[11, 2], state_slot=2)
    short = sequence([60, 61], output=(70,), block_table=[8], state_slot=1, num_computed_tokens=2)
    long = sequence([80, 81, 82], output=(90, 91), block_table=[4, 6], state_slot=3, num_computed_tokens=4)
    return ScheduledBatch([middle, single, whole, short, long], [7, 1, 5, 1, 1], 3)


def build(scheduled: ScheduledBatch):
    return build_batch(scheduled, BlockTables(6, 5, CPU), BLOCK)


def test_tokens_and_positions_lie_flat_without_padding():
    batch = build(mixed())
    assert batch.input_ids.tolist() == [*range(106, 113), 42, 50, 51, 52, 53, 54, 70, 91]
    assert batch.positions.tolist() == [*range(6, 13), 0, 0, 1, 2, 3, 4, 2, 4]


def test_rows_are_counted_on_the_host():
    batch = build(mixed())
    assert (batch.num_prefills, batch.num_prefill_tokens, batch.num_decodes) == (3, 13, 2)
    assert batch.max_query_len == 7
    assert all(type(n) is int for n in (batch.num_prefills, batch.num_prefill_tokens, batch.num_decodes))


def test_query_start_loc_bounds_every_row_and_extend_start_loc_the_prefill_rows():
    batch = build(mixed())
    assert batch.query_start_loc.tolist() == [0, 7, 8, 13, 14, 15]
    assert batch.extend_start_loc.tolist() == [0, 7, 8, 13]


def test_context_and_not_the_rows_length_tells_a_new_row():
    batch = build(mixed())
    assert batch.context_lens.tolist() == [6, 0, 0, 2, 4]
    assert batch.has_initial_state.tolist() == [True, False, False, True, True]


def test_slots_and_blocks_belong_to_the_sequences():
    batch = build(mixed())
    assert batch.state_indices.tolist() == [5, 0, 2, 1, 3]
    tables = batch.block_table[batch.state_indices]
    assert tables.tolist() == [[9, 3, 7, 1], [0, 0, 0, 0], [11, 2, 0, 0], [8, 0, 0, 0], [4, 6, 0, 0]]


def test_slot_mapping_points_into_the_blocks_of_each_token():
    scheduled = mixed()
    batch = build(scheduled)
    expected = []
    for row, count in zip(scheduled.sequences, scheduled.num_scheduled_tokens, strict=True):
        start = row.num_computed_tokens
        expected += [row.block_table[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, start + count)]
    assert batch.slot_mapping.tolist() == expected
    assert expected[:7] == [14, 15, 28, 29, 30, 31, 4]  # block 3 from offset 2, block 7, block 1


def test_logits_are_wanted_for_the_last_token_of_complete_rows_alone():
    assert build(mixed()).logits_indices.tolist() == [7, 12, 13, 14]


def test_no_row_wants_logits_while_its_prompt_is_incomplete():
    middle = sequence(20, block_table=[0, 1], state_slot=0)
    batch = build(ScheduledBatch([middle], [6], 1))
    assert batch.logits_indices.tolist() == [] and batch.logits_indices.dtype == torch.int64


def test_every_tensor_of_a_batch_declares_its_axis_and_dtype_once():
    """A step fills each declared field, and no other: a field more is one line of `ForwardBatch`, and its values."""
    batch, sizes = build(mixed()), {"token": 15, "row": 5, "start": 6, "draw": 4, "snapshot": 0}
    tensors = {field.name for field in dataclasses.fields(ForwardBatch) if field.init and "Tensor" in field.type}
    assert set(BATCH) == tensors - {"block_table"}
    for name, each in BATCH.items():
        found = getattr(batch, name)
        assert (found.dtype, len(found)) == (getattr(torch, each.dtype), sizes[each.axis]), name


@pytest.mark.parametrize("axis", ["token", "row", "draw"])
def test_a_field_that_is_declared_is_padded_and_laid_out_for_decode_rows(monkeypatch, axis):
    field = Each(axis, "int32", padding=-7)
    monkeypatch.setitem(padding.BATCH if axis != "draw" else padding.SAMPLING, "added", field)
    shape, counts = GraphShape(4, 64), Counts(2, 5, 2, max_query_len=3)
    empty = padding.GraphInputs(()).padding(shape).arrays
    size = {"token": 68, "row": 36, "draw": 36}[axis]
    assert empty["added"].tolist() == [-7] * size and empty["added"].dtype == np.int32
    own = {
        name: np.zeros({"token": 7, "row": 4, "start": 5}.get(each.axis, 4), each.dtype)
        for name, each in (padding.BATCH | padding.SAMPLING).items()
    }
    own |= {"added": np.arange(7 if axis == "token" else 4), "snapshots": np.zeros((0, 3), np.int32)}
    padded = padding.pad(own, counts, shape, padding.places_of_draws([0, 1, 2, 3], counts, shape))["added"]
    first = {"token": 64, "row": 32, "draw": 32}[axis]
    brought = 5 if axis == "token" else 2
    assert padded[:brought].tolist() == list(range(brought)) and (padded[brought:first] == -7).all()
    assert padded[first : first + 2].tolist() == [brought, brought + 1] and (padded[first + 2 :] == -7).all()


def test_snapshots_are_sent_as_they_are_and_none_is_a_list_of_none():
    asked = [StepSave(2, 5, 7), StepSave(0, 3, 1)]
    batch = build(dataclasses.replace(mixed(), snapshots=asked))
    assert batch.snapshots.tolist() == [[2, 5, 7], [0, 3, 1]]
    assert build(mixed()).snapshots.shape == (0, 3)


def test_decode_rows_alone():
    rows = [sequence([1, 2], output=(3,), block_table=[i], state_slot=i, num_computed_tokens=2) for i in range(3)]
    batch = build(ScheduledBatch(rows, [1, 1, 1], 0))
    assert (batch.num_prefills, batch.num_prefill_tokens, batch.num_decodes, batch.max_query_len) == (0, 0, 3, 1)
    assert batch.extend_start_loc.tolist() == [0]
    assert batch.logits_indices.tolist() == [0, 1, 2]


def test_tokens_that_wait_in_rings_are_counted():
    decoding = sequence([1, 2], output=(3,), block_table=[0], state_slot=0, num_computed_tokens=2, num_pending_tokens=5)
    assert build(ScheduledBatch([decoding], [1], 0)).num_pending.tolist() == [5]


def test_drafts_come_after_the_last_token_and_each_is_followed_by_a_draw():
    first = sequence([1, 2], output=(3,), block_table=[0, 4], state_slot=0, num_computed_tokens=2, num_pending_tokens=5)
    second = sequence([7], output=(8,), block_table=[2], state_slot=3, num_computed_tokens=1)
    batch = build(ScheduledBatch([first, second], [3, 1], 2, drafts=[[4, 5], []]))
    assert batch.input_ids.tolist() == [3, 4, 5, 8] and batch.positions.tolist() == [2, 3, 4, 1]
    assert batch.logits_indices.tolist() == [0, 1, 2, 3] and batch.num_pending.tolist() == [5, 0]
    assert (batch.num_prefills, batch.num_drafted, batch.num_drafted_tokens, batch.num_decodes) == (2, 2, 4, 0)


def test_recomputing_after_a_preemption_feeds_prompt_and_answer_as_one_prefill():
    fallen = sequence([1, 2, 3], output=(4, 5), block_table=[7, 2], state_slot=1)
    batch = build(ScheduledBatch([fallen], [5], 1))
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.has_initial_state.tolist() == [False] and batch.logits_indices.tolist() == [4]


def test_addresses_beyond_32_bits_survive():
    far = sequence([1], block_table=[2**30], state_slot=0)
    assert build(ScheduledBatch([far], [1], 1)).slot_mapping.tolist() == [2**32]
