"""The inputs of a graph of decode rows, kept on the host from one step to the next.

A continuation's inputs are the last step's after a few additions. Of the sequences it reads only the blocks that rows
begin.
"""

from __future__ import annotations

import numpy as np

from ..memory.operations import Operation
from ..memory.ring import RingRule
from ..outputs import StepOutput
from ..scheduling.continuation import ContinuedStep
from ..scheduling.step import ScheduledBatch
from ..sequence import UNSEEN, Sequence
from .arrays import Arrays, unpack
from .block_tables import CELLS, SentBlocks
from .padding import DECODE_FIELDS, GraphInputs
from .sampling_rows import SamplingRows, draws
from .step_input import StepInput, batch_arrays

STEPS_AHEAD = 16  # random numbers are made for so many steps at once
COUNTED = {name: each.per_step for name, each in DECODE_FIELDS.items() if each.per_step}


class TokenSink:
    """Puts a step's tokens into the answers of its rows. Only for rows that have a token already, and for steps in
    which no row ends."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self._request_ids = [sequence.request_id for sequence in sequences]
        self._tokens = [sequence.output_token_ids for sequence in sequences]
        self._stop_ids = frozenset().union(*{sequence.stop_ids for sequence in sequences})
        first = len(self._tokens[0])
        # Index, in the first row's answer, of the first token with which some row may reach its max_tokens.
        self.end = first + min([s.max_tokens - 1 - len(s.output_token_ids) for s in sequences])

    def take(self, indices: list[int], tokens: list[int]) -> list[StepOutput] | None:
        """Put the tokens in their places and return the outputs. If a token is -1 (bad logits) or a stop id, return
        None and change nothing."""
        if min(tokens) < 0 or not self._stop_ids.isdisjoint(tokens):
            return None
        for answer, index, token_id in zip(self._tokens, indices, tokens, strict=True):
            answer[index] = token_id
        return [
            StepOutput(request_id=request_id, token_ids=[token_id])
            for request_id, token_id in zip(self._request_ids, tokens, strict=True)
        ]


class DecodeRows:
    """Decode rows that need `Sampler.draw` alone, in the smallest shape that holds them.

    sequences: the batch's own list. packed: the shape's inputs, laid out as by `pad`. brings_cells: `packed` holds new
    cells of the block tables.
    """

    def __init__(
        self,
        inputs: GraphInputs,
        blocks: SentBlocks,
        scheduled: ScheduledBatch,
        wanted: SamplingRows,
        block_size: int,
        ring: RingRule,
    ) -> None:
        arrays = batch_arrays(scheduled, block_size)
        self._inputs = inputs
        self._blocks = blocks
        self._block_size = block_size
        self._next_pending = np.array(ring.after_decode, dtype=np.int32)
        self._seeds = wanted.seeds
        self.sequences = scheduled.sequences
        self._indices = np.array([len(sequence.output_token_ids) for sequence in self.sequences])
        self._sink: TokenSink | None = None  # from the second step on: the collector does more for a first token
        self.brings_cells = False
        self._is_drawn = wanted.is_drawn
        self._ahead, self._num_used = self._draw_ahead(), 1
        self._lay_out(arrays | wanted.constant | {"uniform": self._ahead[0]})

    def step_input(self, arrays: Arrays, operations: list[Operation]) -> StepInput:
        """This step's input. arrays: new cells of the block tables, if `packed` has no place for them."""
        return StepInput(
            arrays,
            len(self.sequences),
            self.shape,
            self.packed,
            self.brings_cells,
            is_plain=True,
            operations=operations,
        )

    @property
    def indices(self) -> list[int]:
        """The index of each row's new token in its answer."""
        return self._indices.tolist()

    @property
    def sink(self) -> TokenSink | None:
        """The sink of this step's tokens; None if some row may get its first or last token."""
        is_usable = self._sink is not None and self._indices[0] < self._sink.end
        return self._sink if is_usable else None

    def advance(self, advance: ContinuedStep) -> None:
        """Change the inputs to the next step's, in place."""
        if advance.kept is not None:
            self._keep(advance)
        self._indices += 1
        if self._sink is None:
            self._sink = TokenSink(self.sequences)
        assert self._indices[0] == len(self.sequences[0].output_token_ids), "the step before was not launched"
        own = self._own
        own["input_ids"].fill(UNSEEN)  # stands for the slot's last token, which is on the device
        for name, each_step in COUNTED.items():
            own[name] += each_step
        own["num_pending"][:] = self._next_pending[own["num_pending"]]
        if self._is_drawn:
            if self._num_used == STEPS_AHEAD:
                self._ahead, self._num_used = self._draw_ahead(), 0
            own["uniform"][:] = self._ahead[self._num_used]
            self._num_used += 1
        self._begin_blocks(advance.new_block_rows)

    def _begin_blocks(self, rows: list[int]) -> None:
        """Set the places of the rows whose tokens begin a block, and put the new cells of their tables in `packed`."""
        self.brings_cells = False
        if not rows:
            return
        size, beginning = self._block_size, [self.sequences[row] for row in rows]
        self._own["slot_mapping"][rows] = [s.block_table[s.num_computed_tokens // size] * size for s in beginning]
        new = self._blocks.new_cells(beginning)
        num_new = len(new["cells"])
        self.brings_cells = num_new > 0
        if num_new:
            for name, place in self._cells.items():
                place[:num_new] = new[name]
                place[num_new:] = new[name][0]  # writing the first cell again is harmless

    def _keep(self, advance: ContinuedStep) -> None:
        """Go on with the kept rows, in the smallest shape that holds them."""
        kept = advance.kept
        own = {name: array[kept] for name, array in self._own.items()}
        self.sequences = advance.rows
        self._indices, self._sink = self._indices[kept], None
        self._seeds, self._ahead = self._seeds[kept], self._ahead[:, kept]
        self._lay_out(own)

    def _draw_ahead(self) -> np.ndarray:
        """[STEPS_AHEAD, B] float32, uniform numbers of this step and the next ones; zeros if all rows are greedy."""
        if not self._is_drawn:
            return np.zeros((STEPS_AHEAD, len(self.sequences)), dtype=np.float32)
        return draws(self._seeds, self._indices + np.arange(STEPS_AHEAD)[:, None])

    def _lay_out(self, own: Arrays) -> None:
        """Put the rows' arrays at their places in the smallest shape that holds them."""
        num_rows = len(self.sequences)
        shape = self._inputs.shape_of_decodes(num_rows)
        assert shape is not None, f"no graph holds {num_rows} rows"
        self.shape = shape
        padding = self._inputs.padding(shape)
        self.packed = padding.packed.copy()
        places = unpack(padding.arrays, self.packed)
        self._own = {name: places[name][:num_rows] for name in DECODE_FIELDS}
        for name, place in self._own.items():
            place[:] = own[name]
        self._cells = {name: places[name] for name in CELLS}
