"""The rows of a step by their kind."""

from __future__ import annotations

import pytest
import torch
from leyden.models.forward_batch import ForwardBatch

KINDS = ("prompts", "drafts", "decodes")


def make_batch(prompts: list[int], drafts: list[int], num_decodes: int) -> ForwardBatch:
    """Row b has slot 10 + b and 100 + b tokens before the step, of which b wait; every second row is new."""
    lengths = prompts + drafts + [1] * num_decodes
    index = torch.arange(len(lengths), dtype=torch.int32)
    unused = torch.empty(0)
    return ForwardBatch(
        input_ids=unused,
        positions=unused,
        query_start_loc=torch.tensor([0, *lengths]).cumsum(0).int(),
        context_lens=index + 100,
        has_initial_state=index % 2 == 0,
        state_indices=index + 10,
        num_pending=index.clone(),
        slot_mapping=unused,
        block_table=unused,
        logits_indices=unused,
        snapshots=unused,
        num_prefills=len(prompts) + len(drafts),
        num_prefill_tokens=sum(prompts) + sum(drafts),
        num_decodes=num_decodes,
        max_query_len=max(prompts + drafts, default=1),
        num_drafted=len(drafts),
        num_drafted_tokens=sum(drafts),
    )


STEPS = [([5], [], 0), ([], [3, 2], 0), ([], [], 4), ([7, 1], [4, 4], 3), ([2, 9], [], 2), ([], [6], 1), ([3], [2], 0)]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_rows_of_the_three_kinds_are_the_batch_cut_twice(step):
    prompts, drafts, num_decodes = step
    batch = make_batch(*step)
    lengths = {"prompts": prompts, "drafts": drafts, "decodes": [1] * num_decodes}
    first_row = first_token = 0
    for kind in KINDS:
        part = getattr(batch, kind)
        assert (part is None) == (not lengths[kind])
        if part is None:
            continue
        rows = slice(first_row, first_row + len(lengths[kind]))
        assert part.tokens == slice(first_token, first_token + sum(lengths[kind]))
        assert torch.equal(part.rows.slots, batch.state_indices[rows])
        assert torch.equal(part.rows.continues, batch.has_initial_state[rows])
        assert part.rows.starts.diff().tolist() == lengths[kind]
        assert part.rows.starts[0] == first_token, "starts count from the step's first token"
        assert part.rows.max_len >= max(lengths[kind])
        assert torch.equal(part.context_lens, batch.context_lens[rows])
        assert torch.equal(part.num_pending, batch.num_pending[rows])
        first_row, first_token = rows.stop, part.tokens.stop


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_prefills_are_prompts_and_drafts_together(step):
    prompts, drafts, _ = step
    batch = make_batch(*step)
    if not prompts + drafts:
        assert batch.prefills is None
        return
    assert batch.prefills.rows.starts.diff().tolist() == prompts + drafts
    assert batch.prefills.tokens == slice(0, sum(prompts + drafts))
    assert batch.rows.starts is batch.query_start_loc


def test_rows_see_what_is_written_to_the_batch_later():
    """A CUDA graph is captured once, over static inputs that every step writes anew."""
    batch = make_batch([7, 1], [4, 4], 3)
    for tensor in (batch.query_start_loc, batch.context_lens, batch.state_indices, batch.num_pending):
        tensor += 1000
    batch.has_initial_state.logical_not_()
    assert batch.drafts.rows.starts.tolist() == [1008, 1012, 1016]
    assert batch.drafts.rows.slots.tolist() == [1012, 1013]
    assert batch.drafts.rows.continues.tolist() == [False, True]
    assert batch.decodes.context_lens.tolist() == [1104, 1105, 1106]
    assert batch.decodes.num_pending.tolist() == [1004, 1005, 1006]
