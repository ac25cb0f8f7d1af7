"""All that a step reads, as plain data: made once beside the scheduler, run by every rank."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ...models.forward_batch import ForwardBatch, layout_of
from ..memory.operations import Operation, StepSave
from ..scheduling.step import ScheduledBatch
from ..sequence import Sequence
from .arrays import Arrays, Upload
from .counts import Counts
from .graph_shapes import GraphShape
from .prompt_scores import WantedScores

BATCH = layout_of(ForwardBatch)


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step. `StepComposer` makes it. `ModelRunner.run` needs nothing else, so any process can run it.

    arrays: by name. Always `cells` and `blocks`, new cells of the block tables, if there are any. Without a graph also
    the tensors of `ForwardBatch` and `SamplingBatch`. With a graph also `places`, the draws' places in the shape, and
    the tensors of `SamplingBatch` unless the step is plain.
    padded: [..] uint8, the inputs of the graph. Continuations share this memory, so a step must be run, or sent, before
    the next is composed.
    """

    arrays: Arrays
    num_draws: int  # tokens to draw
    shape: GraphShape | None = None  # the graph that computes the step; None = kernel by kernel
    padded: np.ndarray | None = None
    brings_cells: bool = False  # `padded` holds new cells of the block tables
    is_plain: bool = False  # no row has log-probabilities, bias, penalties or a grammar: the graph's tokens are right
    counts: Counts | None = None  # None = plain decode rows from a graph
    num_columns: int = 0  # columns of the block tables that the longest row needs; without a graph
    num_top: list[int | None] | None = None  # per draw: alternatives wanted, None = no log-probabilities
    scores: list[WantedScores] = dataclasses.field(default_factory=list)
    operations: list[Operation] = dataclasses.field(default_factory=list)  # carried out before the forward pass

    @property
    def is_decode(self) -> bool:
        """The step is plain decode rows alone, from a graph; row i lies at place i."""
        return self.is_plain and self.shape is not None and not self.shape.num_prefills

    def from_graph(self, shape: GraphShape, padded: np.ndarray, arrays: Arrays, *, is_plain: bool) -> StepInput:
        """The same step, computed by a graph."""
        return dataclasses.replace(self, shape=shape, padded=padded, arrays=arrays, is_plain=is_plain)


def make_batch(tensors: Upload | dict[str, Tensor], counts: Counts, block_table: Tensor) -> ForwardBatch:
    """The `ForwardBatch` of one step. tensors: its tensor fields by name, without the block table."""
    fields: dict[str, Any] = {name: tensors[name] for name in BATCH}
    return ForwardBatch(**fields, block_table=block_table, **dataclasses.asdict(counts))


def batch_arrays(scheduled: ScheduledBatch, block_size: int) -> Arrays:
    """The tensor fields of `ForwardBatch` as numpy arrays, without the block table.

    A decode row whose token the host has not seen has input id -1, which stands for its slot's last token.
    """
    sequences, counts = scheduled.sequences, scheduled.num_scheduled_tokens
    context_lens = _ints([sequence.num_computed_tokens for sequence in sequences])
    query_start_loc = np.arange(len(sequences) + 1, dtype=np.int32)
    logits_indices = rows = np.arange(len(sequences))  # rows [T], the row of each token
    positions = context_lens.astype(np.int64)
    if scheduled.num_prefills:
        np.cumsum(counts, out=query_start_loc[1:])
        logits_indices = query_start_loc[1:].astype(np.int64)[scheduled.completing_rows] - 1
        rows = np.repeat(rows, counts)
        if scheduled.num_drafted:
            logits_indices = np.arange(len(rows))
        positions = np.arange(len(rows)) + (positions - query_start_loc[:-1])[rows]
    return {
        "input_ids": _input_ids(scheduled),
        "positions": positions,
        "slot_mapping": _slot_mapping(sequences, context_lens, counts, rows, positions, block_size),
        "logits_indices": logits_indices,
        "query_start_loc": query_start_loc,
        "context_lens": context_lens,
        "state_indices": _ints([sequence.state_slot for sequence in sequences]),
        "num_pending": _ints([sequence.num_pending_tokens for sequence in sequences]),
        "has_initial_state": context_lens > 0,
        "snapshots": np.array(scheduled.snapshots, dtype=np.int32).reshape(-1, len(StepSave._fields)),
    }


def _ints(values: list[Any]) -> np.ndarray:
    """[N] int32; takes half the time of np.array."""
    return np.fromiter(values, np.int32, len(values))


def _slot_mapping(
    sequences: list[Sequence],
    context_lens: np.ndarray,
    counts: list[int],
    rows: np.ndarray,
    positions: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """[T] int64, block * block_size + offset of each token. Reads only the blocks of these tokens, however long the
    tables are. rows, positions: [T], of each token."""
    firsts = context_lens // block_size
    ends = (context_lens + counts - 1) // block_size + 1
    spans = zip(sequences, firsts.tolist(), ends.tolist(), strict=True)
    parts = [sequence.block_table[first:end] for sequence, first, end in spans]
    blocks = np.frombuffer(b"".join(parts), dtype=np.int32).astype(np.int64)
    places = np.cumsum(ends - firsts) - ends  # place in `blocks` of each row's block 0, perhaps before its first
    block, offset = np.divmod(positions, block_size)
    return blocks[places[rows] + block] * block_size + offset


def _input_ids(scheduled: ScheduledBatch) -> np.ndarray:
    sequences, num_prefills = scheduled.sequences, scheduled.num_prefills
    parts = []
    for row, sequence in enumerate(sequences[:num_prefills]):
        start = sequence.num_computed_tokens
        drafts = scheduled.drafts[row] if scheduled.drafts else []
        ids = sequence.token_ids(start, start + scheduled.num_scheduled_tokens[row])
        parts.append(np.array(ids + drafts, dtype=np.int64))
    decoding = _ints([(s.output_token_ids or s.prompt_token_ids)[-1] for s in sequences[num_prefills:]])
    return np.concatenate([*parts, decoding.astype(np.int64)])
